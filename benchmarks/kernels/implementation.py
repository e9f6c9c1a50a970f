"""One way to compute a workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.kernels.workloads import Inputs, Outputs, Workload

Function = Callable[[Inputs], Outputs]


def _same(values: Inputs) -> Inputs:
    return values


@dataclass(frozen=True)
class Implementation:
    """A function, how its inputs are laid out for it, and why it cannot run.

    ``lacks`` says why it cannot run a workload on a device, or None. ``build`` imports, compiles
    and returns the function that is timed; ``prepare`` lays out its inputs beforehand, ``restore``
    undoes that in its outputs before they are compared.
    """

    name: str
    functions: tuple[str, ...]
    build: Callable[[Workload], Function]
    lacks: Callable[[Workload, torch.device], str | None]
    prepare: Callable[[Inputs], Inputs] = _same
    restore: Callable[[Outputs], Outputs] = _same
