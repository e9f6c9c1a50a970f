"""Runs and measures an iteration of egspo and of the baseline on the same problem."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.iteration.baseline import Baseline, BaselineOutcome
from benchmarks.iteration.problem import SIZES, Problem
from benchmarks.meter import Meter, Mode, PhaseCost, merged
from egspo.algorithm.batch import Batch, Metrics
from egspo.algorithm.iteration import Iteration
from egspo.algorithm.phases.clock import PhaseClock
from egspo.algorithm.replay import Scores
from egspo.algorithm.states import States
from egspo.config import TrainConfig
from egspo.engines import WholeModel
from egspo.engines.optimization import build_optimizer
from egspo.engines.processes import Processes
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.work import ModelCost, Work
from egspo.tasks.prompts import Data

Algorithm = Literal["egspo", "egspo-sa"]
Implementation = Literal["egspo", "baseline"]
ALGORITHMS: tuple[Algorithm, ...] = ("egspo", "egspo-sa")
IMPLEMENTATIONS: tuple[Implementation, ...] = ("egspo", "baseline")
PHASES = ("rollout", "select", "score", "update")


class _Engine(WholeModel):
    """One process; says when a step is to be taken."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, before_step: Callable[[], None]
    ) -> None:
        super().__init__(
            model, lambda model: build_optimizer(model, config.optimizer), Processes(alone=True)
        )
        self.before_step = before_step

    def reduce_gradients(self, has_gradient: bool) -> bool:
        self.before_step()
        return super().reduce_gradients(has_gradient)


class _MeasuredClock(PhaseClock):
    """What is left of the rewards after the rollout counts as part of the rollout, and of those of
    one-step completions as part of the scoring."""

    meter: Meter

    @contextmanager
    def __call__(self, metrics: Metrics, step: int, name: str) -> Iterator[None]:
        measured = {"reward": "rollout", "step_reward": "score"}.get(name, name)
        with super().__call__(metrics, step, name), self.meter.phase(measured):
            yield


class MeasuredIteration(Iteration):
    """egspo's iteration, measured phase by phase; what it did is kept to be compared."""

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        denoiser: Denoiser,
        meter: Meter,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        engine = _Engine(denoiser.model, config, before_step)
        super().__init__(config, data, denoiser, engine, engine.processes)
        self.phase = _MeasuredClock(denoiser, engine.processes)
        self.phase.meter = meter
        self.states: States
        self.scores: Scores
        self.advantage: Tensor
        train = self.optimize

        def keep(batch: Batch, advantage: Tensor) -> Metrics:
            self.states, self.scores, self.advantage = batch.states, batch.scores, advantage
            return train(batch, advantage)

        self.optimize = keep  # type: ignore[assignment]

    def selected(self) -> Tensor:
        """int64 [B, K]."""
        rows, ranks = len(self.states.trajectory), self.config.algorithm.selected_steps
        selected = self.states.step.new_full((rows, ranks), -1)
        selected[self.states.row, self.states.rank] = self.states.step
        return selected


@dataclass(frozen=True)
class Agreement:
    """Of the baseline with egspo."""

    tokens: float
    """Share of completion positions with the same token, revealed at the same step."""
    selected: float
    """Share of selected steps."""


class Bench:
    """Both implementations on one problem, sharing a model."""

    def __init__(
        self,
        problem: Problem,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.problem, self.device, self.clock = problem, torch.device(device), clock
        self.denoiser = problem.denoiser(self.device)
        self.data = problem.data()

    def egspo(
        self, algorithm: Algorithm, meter: Meter, before_step: Callable[[], None] = lambda: None
    ) -> MeasuredIteration:
        """One iteration of egspo.

        Raises:
            RuntimeError: the rewards of a group are all equal, so that there was less to do.
        """
        config = self.problem.config(stepwise=algorithm == "egspo-sa")
        iteration = MeasuredIteration(config, self.data, self.denoiser, meter, before_step)
        with meter.running():
            # Step 1 of a run that evaluates at no step but the first and the last.
            iteration.run(1, list(range(self.problem.prompts)), 0)
        if len(iteration.states.trajectory) != self.problem.sequences:
            raise RuntimeError("a group whose rewards are equal was skipped: nothing to compare")
        return iteration

    def baseline(
        self,
        algorithm: Algorithm,
        meter: Meter,
        follow: tuple[Tensor, Tensor, Tensor] | None = None,
        before_step: Callable[[], None] = lambda: None,
    ) -> tuple[Baseline, BaselineOutcome]:
        """One iteration of the baseline; ``follow`` as :meth:`Baseline.run` takes it."""
        config = self.problem.config(stepwise=algorithm == "egspo-sa")
        optimizer = build_optimizer(self.denoiser.model, config.optimizer)
        baseline = Baseline(config, self.data, self.denoiser, optimizer, before_step)
        with meter.running():
            return baseline, baseline.run(meter, follow)

    def meter(self, mode: Mode) -> Meter:
        return Meter(self.device, mode, self.clock)

    def run(
        self, implementation: Implementation, algorithm: Algorithm, mode: Mode
    ) -> dict[str, PhaseCost]:
        """Costs by phase of one iteration."""
        meter = self.meter(mode)
        (self.egspo if implementation == "egspo" else self.baseline)(algorithm, meter)
        return meter.phases

    def measure(
        self, implementation: Implementation, algorithm: Algorithm, repeats: int
    ) -> dict[str, PhaseCost]:
        """Costs by phase: seconds of the fastest of ``repeats`` iterations after one to warm up."""
        counted = self.run(implementation, algorithm, "count")
        runs = [self.run(implementation, algorithm, "time") for _ in range(repeats)]
        return merged(min(runs, key=seconds), counted)

    def agreement(self, algorithm: Algorithm) -> Agreement:
        """How far the two rollouts and selections are the same."""
        ours = self.egspo(algorithm, self.meter("time"))
        _, theirs = self.baseline(algorithm, self.meter("time"))
        trajectory = ours.states.trajectory
        tokens, unmask_step = trajectory.tokens, trajectory.unmask_step
        length = tokens.shape[1]
        offset = theirs.denoised.final.shape[1] - length
        when = torch.empty_like(tokens)
        for step, columns in enumerate(theirs.denoised.revealed):
            when.scatter_(1, columns - offset, torch.full_like(columns, step))
        same = (theirs.denoised.final[:, -length:] == tokens) & (when == unmask_step)
        selected = ours.selected() == theirs.selected
        return Agreement(float(same.double().mean()), float(selected.double().mean()))

    def work(
        self, implementation: Implementation, algorithm: Algorithm
    ) -> tuple[dict[str, Work], dict[str, PhaseCost]]:
        """Passes made, and seconds, by phase."""
        meter = WorkMeter(self.device, "time")
        if implementation == "egspo":
            meter.work = self.denoiser.work
            self.egspo(algorithm, meter)
        else:
            config = self.problem.config(stepwise=algorithm == "egspo-sa")
            optimizer = build_optimizer(self.denoiser.model, config.optimizer)
            baseline = Baseline(config, self.data, self.denoiser, optimizer)
            meter.work = baseline.work
            baseline.run(meter)
        return meter.done, meter.phases


class WorkMeter(Meter):
    """Also notes the passes of each phase."""

    work: Work
    done: dict[str, Work]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not hasattr(self, "done"):
            self.done = {}
        before = self.work.copy()
        with super().phase(name):
            yield
        made = self.work - before
        self.done[name] = made if name not in self.done else self.done[name] - (Work() - made)


def seconds(phases: dict[str, PhaseCost]) -> float:
    """Of all phases."""
    return sum(cost.seconds for cost in phases.values())


def flops_at(
    problem: Problem, implementation: Implementation, work: dict[str, Work]
) -> dict[str, int]:
    """FLOPs by phase of the passes ``work`` in a model of the sizes of ``problem``, which need not
    fit anywhere: matrix products, counted from sizes as :mod:`egspo.rollouts.work` does."""
    cost, base = ModelCost.of(problem.meta_model()), ModelCost.of(problem.meta_model(adapted=False))
    assert cost is not None and base is not None
    result: dict[str, int] = {}
    for name, done in work.items():
        flops = cost.training(done) if name == "update" else cost.forward(done)
        if name == "update" and implementation == "baseline":
            flops -= cost.per_head_row * done.head_rows  # it keeps logits instead of remaking them
        if name == "score" and problem.beta > 0:
            flops = base.forward(done)  # of the reference policy, without adapter
        result[name] = flops
    return result


def passes_of(
    problem: Problem, implementation: Implementation, algorithm: Algorithm
) -> dict[str, Work]:
    """Passes by phase of an iteration with the sequences of ``problem``, run with a tiny model."""
    return Bench(problem.at_size_of(replace(SIZES["tiny"], layers=1))).work(
        implementation, algorithm
    )[0]
