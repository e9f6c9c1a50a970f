"""Runs what a launcher launches: compiled for a GPU that is not there, simulated on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.kernels.ptx import instructions  # noqa: F401
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.memory import Memory
from tests.kernels.ptx.program import Program, parse

LANES = 4096
"""Threads simulated at once: as many programs as make these."""


@contextlib.contextmanager
def simulated(capability: int, ulps: int = 0) -> Iterator[list[str]]:
    """Inside, launches on CPU tensors run the PTX for ``sm_<capability>``.

    Yields:
        filled with the names of the kernels launched.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", capability, 32)
    stub = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    launched: list[str] = []
    compile_only = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        bound, _, _ = self.device_caches[capability][4](*args, **kwargs)
        launched.append(self.__name__)
        _launch(kernel, bound, (*grid, 1, 1)[:3], ulps)

    assert not triton.knobs.runtime.interpret, "kernels made for the interpreter are not compiled"
    previous = driver._active
    driver.set_active(stub)
    try:
        with mock.patch.object(JITFunction, "run", run):
            yield launched
    finally:
        driver._active = previous


@functools.lru_cache(maxsize=256)
def _parsed(ptx: str) -> Program:
    return parse(ptx)


def _launch(kernel: Any, arguments: dict[str, Any], grid: tuple[int, int, int], ulps: int) -> None:
    program = _parsed(kernel.asm["ptx"])
    names = [name for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    values = [arguments[name] for name in names]
    bits = [
        _bits(value, kernel.src.signature[name]) for name, value in zip(names, values, strict=True)
    ]
    # Triton adds pointers to scratch memory, which these kernels do not use.
    bits += [0] * (len(program.parameters) - len(bits))
    parameters = dict(zip(program.parameters, bits, strict=True))
    memory = Memory([value for value in values if isinstance(value, torch.Tensor)])
    total = grid[0] * grid[1] * grid[2]
    step = max(1, LANES // program.threads)
    for start in range(0, total, step):
        programs = range(start, min(start + step, total))
        shared = max(kernel.metadata.shared, 16)
        Machine(program, memory, parameters, programs, grid, shared, ulps).run()


def _bits(value: Any, kind: str) -> int:
    """A kernel's argument as the bits of its parameter."""
    if kind.startswith("*"):
        return int(value.data_ptr())
    if kind == "fp32":
        return int(np.float32(value).view(np.uint32))
    size = int(kind[1:])
    low, high = (-(2 ** (size - 1)), 2 ** (size - 1)) if kind[0] == "i" else (0, 2**size)
    if not low <= int(value) < high:
        raise OverflowError(f"{value} does not fit {kind}")
    return int(value) & 2**size - 1
