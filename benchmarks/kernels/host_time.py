"""Processor time of a call of a Triton function, up to launches that do nothing.

    python -m benchmarks.kernels.host_time            # every function; needs no GPU

The kernels are compiled for sm_90 and loaded nowhere: tensors lie on the CPU, and what would hand a
kernel to the driver returns at once. What is left is what this package, Triton and autograd do in
Python: checks, the choice of a backend, outputs, launch arguments. The smallest of many short runs
counts, as other processes only add.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from egspo_kernels import sample_tokens, stepwise_surrogate, token_stats
from egspo_kernels.checks import arguments

ROWS, VOCAB, STEPS = 8, 1000, 4


class _NoLaunch:
    """In the place of what launches a compiled kernel."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> None: ...


@contextlib.contextmanager
def launches_do_nothing() -> Iterator[None]:
    """Inside, the Triton backend takes CPU tensors as it takes a GPU's, and launches nothing."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    # Kernels are made for a compiler or for the interpreter when they are imported: now.
    from egspo_kernels.triton_kernels import launch, rows, sampling, surrogate

    del rows, sampling, surrogate
    if launch.INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels are launched otherwise")
    stub = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        launcher_cls=_NoLaunch,
        utils=SimpleNamespace(
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        ),
    )
    previous = driver._active
    driver.set_active(stub)
    # The variable is read when a backend is chosen, where it allows CPU tensors.
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
        mock.patch.object(arguments, "may_read_values", lambda tensor: False),
    ):
        try:
            yield
        finally:
            driver._active = previous


def calls() -> dict[str, Callable[[], object]]:
    """What is timed."""
    logits = torch.zeros(ROWS, VOCAB, dtype=torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    targets, step_ids = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS) % STEPS
    values = torch.zeros(STEPS)

    def surrogate(kl: Any, **reference: Any) -> torch.Tensor:
        return stepwise_surrogate(
            leaf,
            targets,
            step_ids,
            values,
            values,
            clip_low=0.2,
            clip_high=0.2,
            beta=0.1 if kl else 0.0,
            kl=kl,
            backend="triton",
            **reference,
        ).loss

    def both(kl: Any, **reference: Any) -> object:
        return torch.autograd.grad(surrogate(kl, **reference), leaf)

    return {
        "token_stats": lambda: token_stats(logits, targets, backend="triton"),
        "sample_tokens": lambda: sample_tokens(
            logits, temperature=0.5, seed=1, step=2, row_ids=targets, backend="triton"
        ),
        "stepwise_surrogate, forward": lambda: surrogate(None),
        "stepwise_surrogate, forward and backward": lambda: both(None),
        "with k3": lambda: both("k3", ref_log_prob=values),
        "with the exact KL": lambda: both("exact", ref_logits=logits),
        "one operation, forward and backward (floor)": lambda: torch.autograd.grad(
            leaf.sum(), leaf
        ),
    }


def processor_time(call: Callable[[], object], runs: int, length: int = 20) -> float:
    """Seconds of a call: the mean of the fastest of ``runs`` runs of ``length`` calls."""
    call()
    best = float("inf")
    for _ in range(runs):
        start = time.process_time()
        for _ in range(length):
            call()
        best = min(best, (time.process_time() - start) / length)
    return best


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.host_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=200, help="runs of each call (200)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'call':46s} us of processor time")
    with launches_do_nothing():
        for name, call in calls().items():
            print(f"{name:46s} {processor_time(call, args.runs) * 1e6:.1f}")


if __name__ == "__main__":
    main()
