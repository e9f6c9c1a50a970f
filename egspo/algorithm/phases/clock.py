"""What the phases of a step take: seconds, FLOPs, forward passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from egspo.algorithm.batch import Metrics
from egspo.engines.processes import Processes
from egspo.engines.reduction import Count, share
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.work import ModelCost


class PhaseClock:
    """Measures phases, and tells the other processes which one this process is in.

    Args:
        denoiser: counts its forward passes.
        processes: this one among all of them.
    """

    def __init__(self, denoiser: Denoiser, processes: Processes) -> None:
        self.denoiser, self.processes = denoiser, processes
        self.cost = ModelCost.of(denoiser.model)

    @contextmanager
    def __call__(self, metrics: Metrics, step: int, name: str) -> Iterator[None]:
        """Add time, FLOPs and, of the rollout, what else its forward passes took to ``metrics``."""
        self.processes.enter(f"{name} of step {step}")
        start, before = time.perf_counter(), self.denoiser.work.copy()
        with self.processes.collective():
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        metrics[f"time/{name}"] = time.perf_counter() - start
        work = self.denoiser.work - before
        if self.cost is not None and name in ("rollout", "score", "update"):
            count = self.cost.training if name == "update" else self.cost.forward
            metrics[f"flops/{name}"] = Count(count(work))
        if self.denoiser.block_size is not None and name in ("score", "update"):
            spared = work.spared_columns
            metrics[f"shared/{name}"] = share(spared, work.tokens + spared)
        if name == "rollout":
            metrics["rollout/forwards"] = Count(work.forwards)
            metrics["rollout/head_rows"] = Count(work.head_rows)
            metrics["rollout/logits_bytes"] = Count(work.logits_bytes)
            metrics["rollout/cache_bytes"] = Count(work.cache_bytes)
