"""Every variant compiles for GPUs that no other test compiles for: nothing runs here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kernels.launches import STATISTICS, SURROGATE

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SETUP = """
import sys
from types import SimpleNamespace
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

backend, architecture, warp = sys.argv[1:]
number = int(architecture) if architecture.isdigit() else architecture
target = GPUTarget(backend, number, int(warp))
driver.set_active(SimpleNamespace(
    get_current_target=lambda: target,
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
))
run = JITFunction.run
compiled = set()

def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    assert kernel.asm["cubin" if backend == "cuda" else "hsaco"]
    compiled.add((self.__name__, id(kernel)))

JITFunction.run = compile_only
"""
# Samples: every pair of dtype, temperatures and alignment of the vocabulary.
LAUNCHES = """
for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
    for vocab in (LLADA, 8001):
        stats(2, vocab, dtype, targets=True, picked=True)
    for j, (temperature, entropy_temperature) in enumerate(
        ((1.0, 1.0), (0.5, 0.7), (0.5, 0.5), (0.0, 1.0))
    ):
        sample(2, (LLADA, 8001)[(i + j) % 2], dtype, temperature=temperature,
               entropy_temperature=entropy_temperature)
    for kl in (None, "k3", "exact"):
        stepwise(2, 2, kl, dtype)
    statistics_gradient(dtype)
print(len(compiled), sorted({name for name, _ in compiled}))
"""
KERNELS = [
    "row_gradient_kernel",
    "row_kl_kernel",
    "row_normaliser_kernel",
    "row_sample_kernel",
    "row_statistics_kernel",
    "segment_kl_kernel",
    "segment_sample_kernel",
    "segment_statistics_kernel",
    "step_kernel",
    "total_kernel",
]


@pytest.mark.parametrize(
    ("backend", "architecture", "warp"),
    [("cuda", 100, 32), ("cuda", 120, 32), ("hip", "gfx942", 64), ("hip", "gfx1100", 32)],
)
def test_every_variant_compiles(backend: str, architecture: int | str, warp: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-", backend, str(architecture), str(warp)],
        input=SETUP + STATISTICS + SURROGATE + LAUNCHES,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    count, names = result.stdout.splitlines()[-1].split(None, 1)
    assert names == str(KERNELS) and int(count) >= 50
