"""Micro-batches: how many states share a pass changes what it costs, and not the gradient."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo.algorithm.iteration import Iteration
from egspo.algorithm.micro_batches import Columns, MicroBatches
from egspo.algorithm.replay import Scorer
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, GenerationConfig, TrainConfig
from egspo.engines import WholeModel
from egspo.engines.optimization import build_optimizer
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout
from egspo.runs.metrics import read_metrics
from egspo.training.trainer import Trainer
from tests.algorithm.test_replay import prompts_of, small_denoiser
from tests.helpers import runs
from tests.helpers.marks import first_fast
from tests.helpers.runs import LETTERS

pytestmark = pytest.mark.usefixtures("no_plots", "varied")

LORA = {"model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.5}}}
STATES = 2 * 2 * 2
SMALL: dict[str, Any] = {
    **LETTERS,
    "prompts_per_step": 2,
    "algorithm": {"group_size": 2, "selected_steps": 2, "stop_at_eos": False, "beta": 0.0},
}
GENERATION = GenerationConfig(
    max_new_tokens=12, steps=6, block_length=4, temperature=0.9, early_exit=False
)


def limited(**changes: Any) -> dict[str, Any]:
    """Changes to a recipe that already says ``micro_batch_size``."""
    return {"micro_batch_size": None, **changes}


# --- Packing


def selected_states(lengths: list[int], denoiser: Denoiser, config: GenerationConfig) -> States:
    ids = torch.arange(len(lengths))
    sampled = rollout(denoiser, prompts_of(lengths), config, seed=1, sequence_ids=ids)
    return States.from_selection(sampled, torch.tensor([[4, 0, 1]] * len(lengths)))


@pytest.mark.parametrize("guidance", [0.0, 0.5])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("ranks", [None, 3])
def test_the_budget_is_of_columns_really_computed(
    cache: Any, guidance: float, ranks: int | None
) -> None:
    denoiser, config = small_denoiser(), replace(GENERATION, cache=cache, guidance=guidance)
    states = selected_states([30, 2, 9, 3, 9, 1], denoiser, config)
    limit = MicroBatches(None, 120, config, denoiser.prediction_shift)
    groups = limit.plan(states, ranks=ranks)
    assert len(groups) == (ranks or 1)
    columns = Columns.of(states, config, denoiser.prediction_shift)
    scorer = Scorer(denoiser, AlgorithmConfig(beta=0.0), config)
    for group in groups:
        for index in group:
            before = denoiser.work.copy()
            scorer.replay(states, [[index]], complete=True)
            computed = (denoiser.work - before).tokens
            assert computed == columns.count(index.tolist())
            assert computed <= 120 or len(index) == 1
    taken = torch.cat([index for group in groups for index in group])
    assert sorted(taken.tolist()) == list(range(18))
    sizes = [len(index) for index in groups[0]]
    assert sizes[0] < max(sizes)  # long prompts first, and few of them together


def test_an_empty_plan_and_a_state_over_the_budget() -> None:
    denoiser = small_denoiser()
    states = selected_states([5, 5], denoiser, GENERATION)
    for size, tokens, counts in ((4, None, [4, 2]), (None, 1, [1] * 6), (None, 40, [2] * 3)):
        limit = MicroBatches(size, tokens, GENERATION, 0)
        assert [len(index) for index in limit.plan(states, ranks=None)[0]] == counts
        nothing = States.from_selection(states.trajectory, torch.full((2, 3), -1))
        assert limit.plan(nothing, ranks=2) == [[], []]
    for both in ((4, 4), (None, None)):
        with pytest.raises(ValueError, match="one of size and tokens"):
            MicroBatches(*both, GENERATION, 0)


def test_the_two_options_exclude_each_other(tmp_path: Path) -> None:
    assert runs.config(tmp_path, limited()).micro_batch_size == 32
    config = runs.config(tmp_path, limited(micro_batch_tokens=100))
    assert (config.micro_batch_size, config.micro_batch_tokens) == (None, 100)
    with pytest.raises(ValueError, match=r"micro_batch_size \(8\) and micro_batch_tokens \(9\)"):
        runs.config(tmp_path, {"micro_batch_tokens": 9})
    with pytest.raises(ValueError, match="micro_batch_tokens must be > 0, got 0"):
        runs.config(tmp_path, limited(micro_batch_tokens=0))


# --- The gradient


class FirstStep:
    """The first training step of a recipe in float64, which keeps its gradients."""

    def __init__(self, config: TrainConfig) -> None:
        trainer = Trainer(config)
        denoiser = trainer.denoiser
        for model in (denoiser.model, denoiser._reference):
            if model is not None:
                model.double()
        self.model: Any = denoiser.model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # away from the reference policy, and from adapters that are zero
            for parameter in self.trained:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        self.gradients: list[list[Tensor]] = []
        engine = WholeModel(
            self.model, lambda model: build_optimizer(model, config.optimizer), trainer.processes
        )
        engine.reduce_gradients = self.keep  # type: ignore[method-assign]
        self.iteration = Iteration(config, trainer.data, denoiser, engine, trainer.processes)

    def keep(self, has_gradient: bool) -> bool:
        """In the place of an optimizer step, so that the next group is of the same weights."""
        assert has_gradient
        self.gradients.append([p.grad.clone() for p in self.trained if p.grad is not None])
        self.model.zero_grad()
        return False

    def run(self) -> dict[str, Any]:
        self.gradients = []
        metrics = self.iteration.run(1, [0, 3], 0)
        assert metrics["skipped/groups"] == 0
        return metrics


def assert_same(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        largest = max(float(gradient.abs().max()) for gradient in theirs)
        assert largest > 1e-3
        for a, b in zip(mine, theirs, strict=True):
            # Rotary embedding rounds to float32, and may round the last bit the other way.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7 * largest)


@pytest.mark.parametrize("schedule", first_fast(["joint", "per_step"]))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm": {"beta": 0.1, "kl": "k3"}, **LORA},
        {"algorithm": {"beta": 0.1, "kl": "exact", "stepwise": False}, **LORA},
        {"algorithm": {"beta": 0.1, "kl": "exact"}},
        {"algorithm": {"beta": 0.1, "kl": "exact"}, "generation": {"cache": "dual"}},
        {"generation": {"cache": "prefix", "guidance": 0.5}},
    ],
    ids=["plain", "lora-k3", "lora-exact", "copy-exact", "dual", "prefix-guided"],
)
def test_the_gradient_does_not_depend_on_the_split(
    changes: dict[str, Any], schedule: str, tmp_path: Path
) -> None:
    """Every number of states, from one at a time to all together, and a budget of columns."""
    options = (SMALL, changes, {"algorithm": {"schedule": schedule}})
    config = runs.config(tmp_path, *options)
    step = FirstStep(config)
    groups = 1 if schedule == "joint" else 2

    def gradients(size: int | None, tokens: int | None = None) -> list[list[Tensor]]:
        step.iteration.micro_batches.size, step.iteration.micro_batches.tokens = size, tokens
        step.run()
        return step.gradients

    whole = gradients(STATES)
    assert len(whole) == groups
    for size in range(1, STATES // groups):
        assert_same(gradients(size), whole)
    assert_same(gradients(None, 45), whole)


# --- Out of memory


class LimitedMemory:
    """Passes over more than ``limit`` sequences run out of memory.

    Args:
        step: whose model it is.
        phase: ``replay``: without gradients; ``forward``, ``backward``: of the update.
    """

    def __init__(self, step: FirstStep, phase: str, limit: int) -> None:
        self.step, self.phase, self.limit = step, phase, limit
        self.original, step.model.forward = step.model.forward, self.forward
        self.sequences = self.failures = 0
        if phase == "backward":
            step.trained[0].register_hook(self.backward)  # of the last weight to be reached

    def forward(self, *, input_ids: Tensor, **options: Any) -> Any:
        self.sequences = input_ids.shape[0]
        if (self.phase == "forward") if torch.is_grad_enabled() else (self.phase == "replay"):
            self.check()
        return self.original(input_ids=input_ids, **options)

    def backward(self, gradient: Tensor) -> None:
        if self.sequences > self.limit:  # the failed pass has left something behind
            assert any(p.grad is not None for p in self.step.trained[1:])
        self.check()

    def check(self) -> None:
        if self.sequences > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")


DOING = {"replay": "replaying", "forward": "updating on", "backward": "updating on"}


@pytest.mark.parametrize("phase", DOING)
@pytest.mark.parametrize("schedule", ["joint", "per_step"])
@pytest.mark.parametrize("budget", first_fast([False, True]))
def test_out_of_memory_splits_and_the_gradient_stays(
    phase: str, schedule: str, budget: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything but the number of micro-batches is as if memory had sufficed."""
    kl = {"algorithm": {"schedule": schedule, "beta": 0.1, "kl": "exact"}, **LORA}
    size = limited(micro_batch_tokens=1000) if budget else {"micro_batch_size": STATES}
    whole, step = (FirstStep(runs.config(tmp_path, SMALL, kl, size)) for _ in range(2))
    expected = whole.run()
    memory = LimitedMemory(step, phase, 4 if phase == "replay" and schedule == "joint" else 2)
    step.iteration.config.generation.batch_size = 1  # the rollout is not what is looked at here
    with caplog.at_level(logging.WARNING, "egspo"):
        actual = step.run()
    assert_same(step.gradients, whole.gradients)
    for name in ("step_reward/mean", "skipped/step_rewards", "advantage/std", "selected/states"):
        assert actual[name] == expected[name]
    # The metrics of a group that began again are of its last attempt alone.
    assert actual["ratio/mean"].number == expected["ratio/mean"].number
    assert actual["ratio/drift"].largest < 1e-4  # the rollout is in other shapes

    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == memory.failures > 0
    first = STATES if schedule == "joint" else STATES // 2
    assert f"out of memory {DOING[phase]} {first} states" in messages[0]
    limit = step.iteration.micro_batches
    name, value = ("tokens", limit.tokens) if budget else ("size", limit.size)
    assert f"(micro_batch_{name}={value} would begin there)" in messages[-1]

    caplog.clear()
    step.run()  # the size is remembered
    assert not caplog.records
    assert_same(step.gradients, whole.gradients)
    begun = limited(**{f"micro_batch_{name}": value})
    again = FirstStep(runs.config(tmp_path, SMALL, kl, begun))
    memory = LimitedMemory(again, phase, memory.limit)
    again.iteration.config.generation.batch_size = 1
    again.run()
    assert memory.failures == 0


@pytest.mark.parametrize("phase", DOING)
def test_a_state_that_does_not_fit_alone(phase: str, tmp_path: Path) -> None:
    with_reference = {"algorithm": {"beta": 0.1}, **LORA}
    step = FirstStep(runs.config(tmp_path, SMALL, with_reference, {"micro_batch_size": 4}))
    # So little memory only after the rollout, which has its own way out.
    score = step.iteration.objective.score

    def broken(*arguments: Any, **options: Any) -> Any:
        LimitedMemory(step, phase, 0)
        return score(*arguments, **options)

    step.iteration.objective.score = broken  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError) as error:
        step.run()
    assert f"even {DOING[phase]} one state of" in error.value.__notes__[0]
    assert "egspo plan" in error.value.__notes__[0]


def test_a_whole_run_by_budget(tmp_path: Path) -> None:
    """Also that it may be continued with another one."""
    recipe = (SMALL, {"steps": 2}, limited(micro_batch_tokens=60))
    Trainer(runs.config(tmp_path, *recipe)).run()
    assert [record["ratio/max"] for record in read_metrics(tmp_path)[1:]] == [1.0, 1.0]
    more = (SMALL, {"steps": 3, "micro_batch_size": 5})
    Trainer(runs.config(tmp_path, *more), resume=tmp_path).run()
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]
