"""The next rollout before the update of this step: correct by the ratio, drained, and faster."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo.algorithm.batch import Batch
from egspo.algorithm.iteration import Iteration
from egspo.algorithm.objectives.stepwise import StepwiseObjective
from egspo.algorithm.pipeline import Pipeline
from egspo.algorithm.replay import Scorer
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, GenerationConfig, ModelConfig, TrainConfig
from egspo.engines import WholeModel
from egspo.engines.optimization import apply_gradients, build_optimizer
from egspo.engines.processes import Processes
from egspo.engines.reduction import merge
from egspo.rewards.scoring import RewardError
from egspo.rollouts.denoiser import Denoiser
from egspo.runs.checkpoint import find_checkpoint, list_checkpoints
from egspo.runs.metrics import read_metrics
from egspo.tasks import Example, Reward, Task
from egspo.tasks.prompts import Data, PromptSet
from egspo.training.trainer import Trainer, train
from tests.algorithm.test_enumeration import (
    EXACT,
    all_steps,
    flat_gradient,
    relative_error,
    true_gradient,
)
from tests.helpers import runs
from tests.helpers.runs import LETTERS, outcome, strike
from tests.helpers.toy import MASK, PROMPT, enumerate_trajectories, reward, toy_denoiser

UNCLIPPED = AlgorithmConfig(
    strategy="all", aggregation="exact", beta=0.0, clip_low=1.0, clip_high=1e9
)
PIPELINE: dict[str, Any] = {
    **LETTERS,
    "pipeline": True,
    "steps": 9,
    "eval": {"every": 4},
    "checkpoint": {"every": 6, "keep_best": False},
}


pytestmark = pytest.mark.usefixtures("no_plots")


# --- The gradient of a batch that is one update old


def move(denoiser: Denoiser, by: float) -> None:
    """What an update does to the weights."""
    table: Any = denoiser.model.table
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        table += by * torch.randn(table.shape, generator=generator, dtype=table.dtype)


def stale_gradient(
    length: int, generation: GenerationConfig, by: float, *, corrected: bool = True
) -> tuple[Tensor, Denoiser]:
    """Expected gradient at moved weights, through the code that trains, over all trajectories of
    the old ones; and the denoiser with the moved weights.

    Without the correction, the ratio is to the moved weights themselves: 1.
    """
    denoiser = toy_denoiser(length, seed=3)
    enumeration = enumerate_trajectories(denoiser, generation)
    probability = enumeration.probability.detach()
    states = States.from_selection(enumeration.trajectory, all_steps(enumeration))
    groups = states.micro_batches(10_000, ranks=None)
    scorer = Scorer(denoiser, UNCLIPPED, generation)
    scores = scorer.replay(states, groups, complete=False)
    move(denoiser, by)
    if not corrected:
        scores = scorer.replay(states, groups, complete=False)
    weighted = (probability * reward(enumeration.trajectory.tokens))[states.row]
    (index,) = groups[0]
    outcome = scorer.surrogate(states, index, scores, weighted, weight=1.0)
    assert int(outcome.clamped) == int(outcome.clipped_low.sum() + outcome.clipped_high.sum()) == 0
    assert torch.equal(outcome.ratio, torch.ones_like(outcome.ratio)) != corrected
    return -flat_gradient(outcome.loss, denoiser), denoiser


@pytest.mark.parametrize("policy", EXACT)
def test_one_step_trajectories_give_the_gradient_of_the_current_policy(policy: str) -> None:
    """There the ratio is that of whole trajectories: nothing of the staleness is left."""
    generation = GenerationConfig(
        max_new_tokens=3, steps=1, block_length=3, temperature=0.8, policy=policy
    )
    estimate, denoiser = stale_gradient(3, generation, by=0.5)
    truth = true_gradient(denoiser, enumerate_trajectories(denoiser, generation))
    assert relative_error(estimate, truth) < 1e-6
    uncorrected, _ = stale_gradient(3, generation, by=0.5, corrected=False)
    assert relative_error(uncorrected, truth) > 0.1


SEVERAL = GenerationConfig(
    max_new_tokens=4, steps=3, block_length=4, temperature=0.8, policy="random"
)


def test_every_step_is_weighted_to_the_current_policy() -> None:
    """The gradient is that of the reward where one step follows the current policy, and those
    before and after it the policy that rolled out; summed over which one it is."""
    estimate, denoiser = stale_gradient(4, SEVERAL, by=0.5)
    behaviour = toy_denoiser(4, seed=3)
    total = torch.zeros(())
    for step in range(3):

        def logits(canvas: list[int], start: int, step: int = step) -> Tensor:
            # Of four positions the steps reveal two, one and one.
            now = {4: 0, 2: 1, 1: 2}[canvas.count(MASK)]
            model: Any = (denoiser if now == step else behaviour).model
            result: Tensor = model.logits(torch.tensor([canvas]))[0]
            return result if now == step else result.detach()

        mixed = enumerate_trajectories(denoiser, SEVERAL, logits)
        total = total + (mixed.probability * reward(mixed.trajectory.tokens)).sum()
    assert relative_error(estimate, flat_gradient(total, denoiser)) < 1e-6


def test_what_is_left_of_the_staleness_shrinks_with_the_move() -> None:
    """Which states are visited is not corrected: an error of the order of the move."""
    errors = []
    for by in (0.2, 0.1):
        estimate, denoiser = stale_gradient(4, SEVERAL, by)
        truth = true_gradient(denoiser, enumerate_trajectories(denoiser, SEVERAL))
        uncorrected, _ = stale_gradient(4, SEVERAL, by, corrected=False)
        errors.append(relative_error(estimate, truth))
        assert errors[-1] < relative_error(uncorrected, truth)
    assert 1.8 < errors[0] / errors[1] < 2.2


def toy_data() -> Data:
    """Tokens 0 and 1 are text, 2 ends it; scored by a fixed number of each text."""

    def score(completions: Sequence[str], **_: Any) -> list[float]:
        return [sum((3**i) * (int(c) + 1) for i, c in enumerate(t)) % 7 / 7 for t in completions]

    def decode(rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return ["".join(map(str, row)) for row in rows]

    tokenizer: Any = SimpleNamespace(chat_template=None, batch_decode=decode)
    examples = [Example([{"role": "user", "content": "0"}], {}, None)]
    prompts = PromptSet(examples, [list(PROMPT)])
    return Data(
        Task("toy", examples, examples, [Reward("score", score)]), tokenizer, prompts, prompts
    )


def test_the_update_of_a_pipeline_takes_the_importance_weighted_gradient() -> None:
    """Of its second batch: sampled and scored by the first weights, at those after one update."""
    denoiser = toy_denoiser(4, seed=1)
    config = TrainConfig(
        ModelConfig(config={}),
        generation=replace(SEVERAL, policy="max_prob"),
        algorithm=replace(UNCLIPPED, strategy="high_entropy", selected_steps=2, group_size=16),
        steps=9,
        pipeline=True,
        mixed_precision="no",
    )
    config.optimizer.learning_rate, config.optimizer.max_grad_norm = 0.3, 1e9
    table: Any = denoiser.model.table
    weights: list[Tensor] = []
    gradients: list[Tensor] = []

    def keep(has_gradient: bool) -> bool:
        weights.append(table.detach().clone())
        gradients.append(table.grad.clone())
        return has_gradient

    alone = Processes(alone=True)
    engine = WholeModel(
        denoiser.model, lambda model: build_optimizer(model, config.optimizer), alone
    )
    engine.reduce_gradients = keep  # type: ignore[method-assign]
    iteration = Iteration(config, toy_data(), denoiser, engine, alone)
    updated: list[tuple[Batch, Tensor]] = []
    advantages = iteration.objective.advantages

    def spy(batch: Batch, *rest: Any) -> Tensor:
        updated.append((batch, advantages(batch, *rest)))
        return updated[-1][1]

    iteration.objective.advantages = spy  # type: ignore[method-assign]
    with closing(Pipeline(config, iteration, lambda step: ([0, 0], 32 * step))) as pipeline:
        metrics = [pipeline.step(step) for step in (1, 2)]
    assert [record["staleness"] for record in metrics] == [0, 1]

    def objective(table: Tensor) -> Tensor:
        """Mean over trajectories and K of the ratio times the advantage, by the tokens that the
        schedule has in a step, written out."""
        batch, advantage = updated[1]
        trajectory, total = batch.samples.trajectory, torch.zeros((), dtype=torch.float64)
        states = zip(batch.states.row, batch.states.step, advantage, strict=True)
        for row, step, value in states:
            trained = batch.states.trajectory  # of the groups kept
            tokens, when = trained.tokens[row], trained.unmask_step[row]
            canvas = tokens.where(when < step, MASK)
            revealed = when == step
            log_prob = [
                (one[int((canvas * 4 ** torch.arange(4)).sum())][:, :MASK] / 0.8).log_softmax(1)
                for one in (table, weights[0])
            ]
            now, then = (
                each[revealed].gather(1, tokens[revealed, None]).sum() for each in log_prob
            )
            total = total + (now - then).exp() * value
        return total / (len(trajectory) * 2) / (SEVERAL.max_new_tokens / SEVERAL.steps)

    assert not torch.equal(weights[0], weights[1])
    current = weights[1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective(current), current)
    assert float(expected.norm()) > 1e-3
    torch.testing.assert_close(-gradients[1], expected, rtol=1e-9, atol=1e-12)


# --- When it is ahead


def test_staleness_is_one_except_after_evaluations_and_checkpoints(
    tmp_path: Path, varied: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("produce", "update"):
        original = getattr(Iteration, name)

        def spy(self: Iteration, what: Any, *rest: Any, made: Any = (name, original)) -> Any:
            step = what.step if isinstance(what, Batch) else what
            order.append(f"{made[0]} {step}")
            return made[1](self, what, *rest)

        monkeypatch.setattr(Iteration, name, spy)
    train(runs.config(tmp_path, PIPELINE))
    records = read_metrics(tmp_path)[1:]
    assert all(record["updates"] for record in records)
    # An evaluation at 4, 8 and 9, a checkpoint at 6.
    assert [record["staleness"] for record in records] == [0, 1, 1, 1, 0, 1, 0, 1, 0]
    for record in records:
        assert (record["ratio/drift"] is None) == bool(record["staleness"])
        assert (record["ratio/drift"] or 0.0) < 1e-4
        assert (record["ratio/max"] != 1.0) == bool(record["staleness"])
    assert order[:7] == [
        *("produce 1", "produce 2", "update 1", "produce 3", "update 2", "produce 4", "update 3")
    ]
    assert order[7:10] == ["update 4", "produce 5", "produce 6"]
    produced = [int(name.split()[1]) for name in order if name.startswith("produce")]
    assert produced == list(range(1, 10))


def test_a_batch_is_as_old_as_its_weights(tmp_path: Path, letters: list[Reward]) -> None:
    """After a step that taught nothing, what was made ahead is of the policy still."""
    letters.append(Reward("uneven", runs.uneven))
    changes = {"prompts_per_step": 1, "eval": {"every": 0}, "checkpoint": {"every": 0}}
    train(runs.config(tmp_path, PIPELINE, changes))
    records = read_metrics(tmp_path)[1:]
    assert {record["updates"] for record in records} == {0, 1}
    assert records[0]["staleness"] == 0
    for before, record in itertools.pairwise(records):
        assert record["staleness"] == before["updates"]
        if record["updates"] and not record["staleness"]:
            assert record["ratio/drift"] < 1e-4


def test_without_the_option_nothing_is_stale(tmp_path: Path, varied: None) -> None:
    train(runs.config(tmp_path, PIPELINE, {"pipeline": False, "steps": 3}))
    records = read_metrics(tmp_path)[1:]
    assert [(record["staleness"], record["ratio/max"]) for record in records] == [(0, 1.0)] * 3
    assert all(record["ratio/drift"] < 1e-4 for record in records)


@pytest.mark.parametrize("section", ["eval", "checkpoint"])
def test_what_would_never_get_ahead_is_refused(section: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"never gets ahead with {section}.every: 1"):
        runs.config(tmp_path, PIPELINE, {section: {"every": 1}})


def test_without_rewards_to_wait_for_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pipeline: true .* needs algorithm.stepwise: true"):
        runs.config(tmp_path, PIPELINE, {"algorithm": {"preset": "egspo", "stepwise": False}})


# --- Stopped and gone on


STATEFUL: dict[str, Any] = {
    "pipeline": True,
    "steps": 7,
    "algorithm": {"lam_schedule": "halving", "lam_halving_updates": 2, "beta": 0.04},
    "optimizer": {"schedule": "cosine", "warmup_steps": 2},
    "eval": {"every": 0},
    "checkpoint": {"every": 3, "keep_last": 9, "keep_best": False},
}


def interrupted(config: TrainConfig) -> None:
    """Train until the rollout of step 6, which comes before the update of step 5."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    undo = strike(runs.ROLLOUT, 6, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    undo()


def test_resumed_from_a_checkpoint_is_bit_identical(tmp_path: Path) -> None:
    """From the last one that was due; the interrupt saves another, of a step without a drain."""
    whole, stopped = (runs.config(tmp_path / name, STATEFUL) for name in ("whole", "stopped"))
    train(whole)
    stale = [record["staleness"] for record in read_metrics(tmp_path / "whole")[1:]]
    assert stale == [0, 1, 1, 0, 1, 1, 0]
    interrupted(stopped)
    checkpoints = list_checkpoints(tmp_path / "stopped" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-000003", "step-000004"]
    train(stopped, resume=checkpoints[0])
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_from_a_step_that_was_not_drained_it_goes_on_on_the_policy(tmp_path: Path) -> None:
    config = runs.config(tmp_path, STATEFUL)
    interrupted(config)
    train(config, resume=tmp_path)
    records = read_metrics(tmp_path)[1:]
    assert [record["step"] for record in records] == list(range(1, 8))
    assert [record["staleness"] for record in records] == [0, 1, 1, 0, 0, 1, 0]


# --- Rewards meanwhile


def all_the_steps(config: TrainConfig) -> tuple[float, list[dict[str, Any]]]:
    """Seconds that the steps of a run take, without evaluations, and their metrics."""
    trainer = Trainer(config)
    start = time.perf_counter()
    with closing(trainer.pipeline):
        records = [merge([trainer.pipeline.step(step)]) for step in range(1, config.steps + 1)]
    return time.perf_counter() - start, records


def slow(seconds: float) -> Callable[..., list[float]]:
    def score(completions: Sequence[str], **_: Any) -> list[float]:
        time.sleep(seconds)
        return runs.varied(completions)

    return score


AHEAD = {
    "eval": {"every": 0},
    "checkpoint": {"every": 0},
    "micro_batch_size": 100,
}


def test_slow_rewards_are_waited_for_less(
    tmp_path: Path, letters: list[Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both rewards and updates sleep, as an update on a GPU does for this process.

    Once more where the machine was too busy to compare: seconds are never exact.
    """
    letters.append(Reward("slow", slow(0.1)))

    def slow_update(optimizer: Any) -> None:
        time.sleep(0.1)
        apply_gradients(optimizer)

    monkeypatch.setattr("egspo.engines.whole.apply_gradients", slow_update)
    changes = (PIPELINE, AHEAD, {"steps": 4, "generation": {"early_exit": False}})
    for _ in range(3):
        seconds, waited = {}, {}
        for pipeline in (False, True):
            config = runs.config(tmp_path, *changes, {"pipeline": pipeline})
            seconds[pipeline], records = all_the_steps(config)
            waited[pipeline] = sum(record["time/step_reward"] for record in records)
            assert [record["staleness"] for record in records] == [0] + [int(pipeline)] * 3
        assert waited[False] > 4 * 0.09
        if seconds[True] < seconds[False] - 0.7 * 4 * 0.1:
            break
    else:
        pytest.fail(f"{seconds[False]:.2f} s in turn, {seconds[True]:.2f} s ahead")
    assert waited[True] < 0.5 * waited[False]


@pytest.mark.parametrize("source", ["rollout", "replay"])
def test_no_function_is_called_twice_at_once(
    source: str, tmp_path: Path, letters: list[Reward]
) -> None:
    """Though one-step completions of a batch and the completions of the next are both waiting."""
    running, together = threading.Lock(), []

    def score(completions: Sequence[str], **_: Any) -> list[float]:
        together.append(not running.acquire(blocking=False))
        time.sleep(0.02)
        if not together[-1]:
            running.release()
        return runs.varied(completions)

    letters.append(Reward("alone", score))
    changes = {"micro_batch_size": 2, "steps": 3, "algorithm": {"one_step": source}}
    all_the_steps(runs.config(tmp_path, PIPELINE, AHEAD, changes))
    # The completions of three steps, and those of one step: at once from the rollout, by
    # micro-batch from a replay.
    assert len(together) >= (6 if source == "rollout" else 11) and not any(together)


def test_a_failure_ends_the_run_at_its_own_step(
    tmp_path: Path, letters: list[Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before it, whose update ran meanwhile, is whole and saved."""
    broken = threading.Event()
    batches: list[Batch] = []
    updates: list[int] = []

    def score(completions: Sequence[str], **_: Any) -> list[float]:
        if broken.is_set():
            raise KeyError("answer")
        return runs.varied(completions)

    letters.append(Reward("breaks", score))
    score = StepwiseObjective.score
    produce, update = Iteration.produce, Iteration.update

    def breaking(self: StepwiseObjective, *arguments: Any, **options: Any) -> Any:
        if len(batches) == 2:  # of step 3, before the update of step 2, whose rewards are there
            queue, states = batches[1].one_step, batches[1].states
            assert queue is not None and queue.collect(len(states)) and updates == [1]
            broken.set()
        return score(self, *arguments, **options)

    def kept(self: Iteration, *arguments: Any) -> Batch:
        batches.append(produce(self, *arguments))
        return batches[-1]

    def counted(self: Iteration, batch: Batch) -> Any:
        updates.append(batch.step)
        return update(self, batch)

    monkeypatch.setattr(StepwiseObjective, "score", breaking)
    monkeypatch.setattr(Iteration, "produce", kept)
    monkeypatch.setattr(Iteration, "update", counted)
    config = runs.config(tmp_path, PIPELINE, AHEAD, {"steps": 3})
    with pytest.raises(RewardError, match="'breaks' raised KeyError"):
        train(config)
    assert updates == [1, 2, 3]
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2]
    assert find_checkpoint(tmp_path).name == "step-000002"


def test_what_was_made_ahead_is_dropped_with_the_run(
    tmp_path: Path, letters: list[Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update fails while a reward of the next batch runs: those behind it are never called."""
    called, failed = [], threading.Event()

    def score(completions: Sequence[str], **_: Any) -> list[float]:
        called.append(len(completions))
        if waiting.is_set():
            assert failed.wait(10)
        return runs.varied(completions)

    waiting = threading.Event()
    letters.append(Reward("waits", score))
    config = runs.config(tmp_path, PIPELINE, AHEAD, {"micro_batch_size": 1})
    trainer = Trainer(config)
    score = trainer.iteration.objective.score
    made: list[States] = []

    def held(states: States, **options: Any) -> Any:
        made.append(states)
        if len(made) == 2:
            waiting.set()
        return score(states, **options)

    def broken(*_: Any) -> None:
        called.clear()
        raise RuntimeError("the update failed")

    trainer.iteration.objective.score = held  # type: ignore[method-assign]
    monkeypatch.setattr("egspo.engines.whole.clip_gradients", broken)
    with pytest.raises(RuntimeError, match="the update failed"):
        trainer.run()
    failed.set()
    ahead = trainer.pipeline._ahead
    assert ahead is not None and ahead.one_step is not None and len(made[1]) > 5
    ahead.one_step._pool.shutdown(wait=True)
    assert called == []
