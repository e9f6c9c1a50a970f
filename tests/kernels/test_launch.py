"""Launches of variants that ran before: Triton is not asked, and would not have said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kernels.aot import ROOT

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SETUP = """
from types import SimpleNamespace
from triton.runtime.jit import JITFunction, compute_cache_key
from benchmarks.kernels.host_time import launches_do_nothing

stack = launches_do_nothing()
stack.__enter__()
from egspo_kernels.triton_kernels import launch

asked = []
bound = {}

def ask(self, *args, grid, warmup, **kwargs):
    # Nothing is compiled: what matters is which variant it would be.
    binder = self.device_caches[0][4]
    kwargs["debug"] = False
    _, specialization, options = binder(*args, **kwargs)
    asked.append((self.__name__, str(specialization) + str(options)))
    target = SimpleNamespace(backend="cuda")
    name = asked[-1]
    return Kernel(name, SimpleNamespace(target=target))

class Kernel(SimpleNamespace):
    function = packed_metadata = None
    def __init__(self, name, metadata):
        super().__init__(name=name, metadata=metadata)
    def run(self, *args):
        pass

JITFunction.run = ask
call = launch.Launcher.__call__

def checked(self, programs, variant, arguments, options):
    ask(self.kernel, *arguments, grid=None, warmup=False, **options)
    name = asked.pop()
    assert bound.setdefault((id(self), variant), name) == name, (name, bound[id(self), variant])
    call(self, programs, variant, arguments, options)

launch.Launcher.__call__ = checked
"""
LAUNCHES = """
import itertools
import torch
from tests.kernels.launches import sample, statistics_gradient, stats, stepwise

for dtype, skip, stride in itertools.product(
    (torch.bfloat16, torch.float32), (0, 1, 2, 4, 8), (8000, 8001, 8016, 8032)
):
    for n, vocab, targets in itertools.product((1, 2, 16), (7999, 1), (False, True)):
        for temperature, banned in ((1.0, None), (1, 0), (0.7, 16)):
            stats(n, vocab, dtype, stride=stride, skip=skip, targets=targets, picked=targets,
                  temperature=temperature, banned=banned if vocab > 1 else None)
for temperature, entropy_temperature, seed, step in itertools.product(
    (0.0, 1.0, 0.5, 16.0), (1.0, 0.5, 16.0), (0, 1, 16, 2**62, -1), (0, 1, 2**32 - 1)
):
    sample(2, 8001, temperature=temperature, entropy_temperature=entropy_temperature, seed=seed,
           step=step)
for kl, dtype, stride, skip, steps, n in itertools.product(
    (None, "k3", "exact"), (torch.bfloat16, torch.float32), (8000, 8001, 8004), (0, 1), (1, 2, 16),
    (1, 16)
):
    stepwise(n, steps, kl, dtype, 8000, stride=stride, skip=skip, beta=float(n > 1))
    statistics_gradient(dtype, 8000)
print(len(bound), len(asked))
"""


HOOKS = """
import torch
from benchmarks.kernels.host_time import launches_do_nothing

with launches_do_nothing():
    import triton
    from triton.runtime.driver import driver
    from egspo_kernels import token_stats

    launched = []

    class Launch:
        def __init__(self, *_):
            pass
        def __call__(self, *arguments):
            launched.append(arguments)

    driver.active.launcher_cls = Launch

    def launches():
        launched.clear()
        token_stats(torch.zeros(2, 100), None, backend="triton")
        return [(*arguments[:6], len(arguments)) for arguments in launched]

    def told(metadata):
        pass

    hooks = triton.knobs.runtime
    entering, leaving = hooks.launch_enter_hook, hooks.launch_exit_hook
    first, second = launches(), launches()
    assert first == second and len(first) == 2
    assert all(l[6:9] == (None, None, None) for l in launched)
    for hook in (entering, leaving):
        hook.add(told)
        launches()
        assert all(l[6].get()["name"] and l[7:9] == (entering, leaving) for l in launched)
        hook.remove(told)
"""


def run_compiled(script: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-"]
    result = subprocess.run(
        command, input=script, capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_a_launch_is_that_of_triton_and_hooks_are_called() -> None:
    run_compiled(HOOKS)


def test_a_variant_is_the_one_that_triton_would_choose() -> None:
    variants, asked = map(int, run_compiled(SETUP + LAUNCHES).split())
    assert variants == asked > 100  # of thousands of launches
