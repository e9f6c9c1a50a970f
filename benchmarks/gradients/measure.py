"""Gradients of selections on the same trajectories, by the phases of a training step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gradients.recorder import Recorder
from benchmarks.gradients.study import Estimator, full
from egspo.algorithm.batch import Batch, Samples
from egspo.algorithm.iteration import Iteration
from egspo.algorithm.selection import candidate_limits
from egspo.config import TrainConfig
from egspo.engines.reduction import merge
from egspo.files import replacing
from egspo.training.data_order import data_order
from egspo.training.setup import Origin, assemble, launched


@dataclass
class Totals:
    """What is kept of the batches so far, to go on from."""

    batches: int = 0
    empty: int = 0
    """Batches of which every advantage was zero, which have no gradient."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """float32 [parameters] by estimator, over batches."""
    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """By estimator, of every batch."""
    steps: list[dict[str, list[float]]] = field(default_factory=list)
    """Of every batch: norm of each step's gradient, and its mean entropy."""
    seconds: list[float] = field(default_factory=list)

    def variance(self, name: str) -> float | None:
        """Trace of the covariance over batches of the gradient of ``name``; None for one batch."""
        if self.batches < 2:
            return None
        squares = sum(row["norm"] ** 2 for row in self.rows[name])
        mean_square = float(self.sums[name].double().square().sum()) / self.batches
        return max(squares - mean_square, 0.0) / (self.batches - 1)


class Measurement:
    """A policy, its trajectories and the gradients of selections of their steps.

    Args:
        config: of :func:`benchmarks.gradients.study.measured`.
        compared: the selections.
    """

    def __init__(self, config: TrainConfig, compared: Sequence[Estimator]) -> None:
        launch = launched(config)
        parts = assemble(launch, Origin())
        self.config, self.data, self.processes = config, parts.data, launch.processes
        self.recorder = Recorder(parts.denoiser.model, launch.processes)
        self.all, self.compared = full(), list(compared)
        self._iterations = {
            each.name: Iteration(
                each.applied(config), self.data, parts.denoiser, self.recorder, launch.processes
            )
            for each in (self.all, *self.compared)
        }

    def batch(self, number: int, totals: Totals) -> None:
        """Measure the batch ``number``, from 1, and add it to ``totals``."""
        start, count = time.perf_counter(), self.config.prompts_per_step
        first = (number - 1) * count
        prompts = data_order(self.config.seed, len(self.data.train), first, count)
        place = number, prompts, first * self.config.algorithm.group_size
        drawn: dict[tuple[str, str, str], Samples] = {}
        for each in (self.all, *self.compared):
            if each.entropy not in drawn:
                samples, _ = self._iterations[each.name].sample(*place)
                _check_same(samples, next(iter(drawn.values()), samples))
                drawn[each.entropy] = samples
        whole, norms, row = self._of_all(number, drawn[self.all.entropy])
        if not row["norm"]:
            totals.empty += 1
            return
        self._add(totals, self.all.name, whole, row)
        totals.steps.append(norms)
        for each in self.compared:
            gradients, row, _ = self._gradients(each, number, drawn[each.entropy])
            (gradient,) = gradients
            gradient = gradient.double() * each.applied(self.config).ranks
            row["norm"] = float(gradient.norm())
            row["cosine"] = float(gradient @ whole / (gradient.norm() * whole.norm()))
            row["distance"] = float((gradient - whole).norm())
            row["error"] = row["distance"] / float(whole.norm())
            row["share"] = row["norm"] / float(whole.norm())
            self._add(totals, each.name, gradient, row)
        totals.batches += 1
        totals.seconds.append(time.perf_counter() - start)

    def _of_all(
        self, number: int, samples: Samples
    ) -> tuple[Tensor, dict[str, list[float]], dict[str, float]]:
        """The full gradient, of every step its norm and entropy, and what it cost."""
        gradients, row, batch = self._gradients(self.all, number, samples)
        whole = torch.stack(gradients).double().sum(0) if gradients else torch.zeros(1).double()
        row["norm"] = float(whole.norm())
        entropy = batch.samples.trajectory.entropy.double().nanmean(0)
        norms = [0.0] * len(entropy)
        for step, gradient in zip(self._taught(batch), gradients, strict=True):
            norms[step] = float(gradient.double().norm())
        return whole, {"norm": norms, "entropy": entropy.nan_to_num(0.0).tolist()}, row

    def _taught(self, batch: Batch) -> list[int]:
        """The steps at which some trajectory has an advantage: an optimizer step each."""
        objective = self._iterations[self.all.name].objective
        counts = objective.counts(objective.advantages(batch, None))
        return sorted(set(batch.states.step[counts].tolist()))

    def _gradients(
        self, each: Estimator, number: int, samples: Samples
    ) -> tuple[list[Tensor], dict[str, float], Batch]:
        """By optimizer step, with what the update cost and how much entropy it left out."""
        iteration = self._iterations[each.name]
        with closing(iteration.prepare(number, samples, {})) as batch:
            record = merge([iteration.update(batch)])
        flops = record["flops/score"] + record["flops/update"]
        row = {"flops": float(flops), **_entropies(batch, iteration)}
        return self.recorder.taken(), row, batch

    @staticmethod
    def _add(totals: Totals, name: str, gradient: Tensor, row: dict[str, float]) -> None:
        totals.rows.setdefault(name, []).append(row)
        totals.sums[name] = totals.sums.get(name, 0.0) + gradient.float()


def _entropies(batch: Batch, iteration: Iteration) -> dict[str, float]:
    """Steps and entropy of a trajectory that has something to teach, selected and left out."""
    states, sequences = batch.states, max(len(batch.selection.sequences), 1)
    trajectory, algorithm = states.trajectory, iteration.config.algorithm
    limits = candidate_limits(
        trajectory, iteration.denoiser.eos_id, stop_at_eos=algorithm.stop_at_eos
    )
    step = torch.arange(trajectory.num_steps, device=limits.device)
    every = trajectory.entropy.double().nan_to_num(0.0).where(step < limits[:, None], 0.0)
    left = every.index_put((states.row, states.step), every.new_zeros(()))
    return {
        "k": len(states) / sequences,
        "entropy": float(every.sum()) / sequences,
        "left_out": float(left.sum()) / sequences,
    }


def _check_same(one: Samples, other: Samples) -> None:
    """Another definition of the entropy must not change what is drawn."""
    for name in ("tokens", "unmask_step"):
        if not torch.equal(getattr(one.trajectory, name), getattr(other.trajectory, name)):
            raise AssertionError(f"the rollouts differ in {name}")


def load(path: Path, names: Sequence[str], key: str) -> Totals:
    """The totals at ``path``, or empty ones where there are none.

    Raises:
        ValueError: they are of other selections, or of another configuration.
    """
    if not path.exists():
        return Totals()
    content = torch.load(path, weights_only=True)
    if [content.pop("names"), content.pop("key")] != [list(names), key]:
        raise ValueError(f"{path} is of other settings: give another --runs, or the same settings")
    return Totals(**content)


def save(path: Path, totals: Totals, names: Sequence[str], key: str) -> None:
    """What :func:`load` reads: replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        content: dict[str, Any] = {"names": list(names), "key": key, **vars(totals)}
        torch.save(content, temporary)
