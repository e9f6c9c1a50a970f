"""The value head: what it sees, what it learns, and that the policy's gradient is not biased."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from egspo.algorithm.replay import Scorer
from egspo.algorithm.states import States
from egspo.algorithm.value_head import UPDATES, VALUE_FILE, ValueHead
from egspo.config import AlgorithmConfig, GenerationConfig
from egspo.config.recipe import ConfigError
from egspo.engines.processes import Processes
from egspo.engines.reduction import merge
from egspo.files import CheckpointError
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout_blocks
from egspo.rollouts.trajectory import PromptBatch, Trajectory
from egspo.rollouts.work import ModelCost
from egspo.runs.checkpoint import find_checkpoint, list_checkpoints
from egspo.runs.metrics import read_metrics
from egspo.tasks import Reward
from egspo.training.trainer import Trainer, train
from tests.algorithm import test_causal_policy as causal
from tests.algorithm import test_replay as full
from tests.algorithm.test_enumeration import relative_error
from tests.algorithm.test_unbiased_run import PRESET, Problem, smooth
from tests.helpers import runs
from tests.helpers.toy import enumerate_trajectories, toy_denoiser

HEAD: dict[str, Any] = {"algorithm": {"step_values": "head"}}
ALGORITHM = AlgorithmConfig(step_values="head")


def pooled_rollout(
    denoiser: Denoiser, prompts: PromptBatch, config: GenerationConfig
) -> Trajectory:
    options: dict[str, Any] = {"seed": 0, "sequence_ids": torch.arange(len(prompts)), "pool": True}
    return [block.trajectory for block in rollout_blocks(denoiser, prompts, config, **options)][-1]


def new_head(denoiser: Denoiser, rate: float = 1e-2) -> ValueHead:
    config = replace(ALGORITHM, value_learning_rate=rate)
    return ValueHead(config, denoiser, Processes(alone=True))


# --- What it sees


@pytest.mark.parametrize("kind", ["none", "prefix", "dual", "guidance", "llada2"])
def test_it_sees_the_mean_over_the_block_as_the_replay_has_it(kind: str) -> None:
    if kind == "llada2":
        denoiser, config = causal.small_denoiser(kind), causal.GENERATION
        prompts = causal.prompts_of([9, 6, 12])  # with parts of them in the first block
    else:
        changes: dict[str, Any] = {"guidance": 1.0} if kind == "guidance" else {"cache": kind}
        denoiser, config = full.small_denoiser(), replace(full.GENERATION, **changes)
        prompts = full.prompts_of([9, 6, 12])
    sampled = pooled_rollout(denoiser, prompts, config)
    selected = torch.arange(sampled.num_steps)
    selected = selected.where(selected < sampled.steps[:, None], -1)
    states = States.from_selection(sampled, selected)
    batch = Scorer(denoiser, AlgorithmConfig(), config)._batch(states, torch.arange(len(states)))
    with torch.no_grad():
        window, _ = batch.window(Scorer(denoiser, AlgorithmConfig(), config).decoder)
    assert sampled.pooled is not None
    assert sampled.pooled.shape == (3, sampled.num_steps, denoiser.head_weight.shape[1])
    for n in range(len(states)):
        start = int(batch.start[n])
        place = torch.arange(max(start, 0), min(start + config.block_length, batch.canvas.shape[1]))
        rows = window.rows(torch.full_like(place, n), place)
        found = sampled.pooled[states.row[n], states.step[n]]
        torch.testing.assert_close(found, rows.mean(0), rtol=1e-4, atol=1e-5)


# --- What it learns


def problem(generator: torch.Generator, count: int = 64) -> tuple[Trajectory, Tensor]:
    """Completions whose reward the length-normalised hidden states tell, but for noise."""
    sampled = enumerate_trajectories(
        toy_denoiser(4), GenerationConfig(max_new_tokens=4, steps=3, block_length=4)
    ).trajectory.take(torch.arange(count))
    pooled = torch.randn(count, 1, 4, generator=generator, dtype=torch.float64)
    noise = 0.05 * torch.randn(count, 3, 4, generator=generator, dtype=torch.float64)
    centred = torch.nn.functional.layer_norm(pooled[:, 0], (4,))
    rewards = 0.7 + centred @ torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    return replace(sampled, pooled=pooled + noise), rewards


def test_it_learns_a_reward_that_can_be_predicted() -> None:
    denoiser, generator = toy_denoiser(4), torch.Generator().manual_seed(0)
    head = new_head(denoiser)
    reports = []
    for _ in range(40):
        sampled, rewards = problem(generator)
        rewards[:3] = float("nan")  # not scored: left out
        reports.append(head.train(sampled, rewards))
    assert reports[0]["value/loss"] == pytest.approx(float(rewards[3:].square().mean()), rel=0.3)
    assert reports[0]["value/explained"] < 0 and reports[-1]["value/explained"] > 0.95
    sampled, rewards = problem(generator)
    selected = torch.tensor([[2, 0]] * len(sampled))
    states = States.from_selection(sampled, selected)
    values = head.predict(states)
    assert values.dtype == torch.float64
    assert float((values - rewards[states.row]).abs().mean()) < 0.05


def test_rewards_without_variance_and_no_rewards() -> None:
    sampled, rewards = problem(torch.Generator().manual_seed(0))
    head = new_head(toy_denoiser(4))
    assert head.train(sampled, rewards.fill_(0.1))["value/explained"] is None
    before = head.linear.weight.clone()
    nothing = head.train(sampled, rewards.fill_(float("nan")))
    assert nothing == {"value/loss": None, "value/explained": None}
    assert torch.equal(head.linear.weight, before)


def test_products_are_counted() -> None:
    denoiser = full.small_denoiser()
    sampled = pooled_rollout(denoiser, full.prompts_of([9, 6, 12]), full.GENERATION)
    head, cost, before = new_head(denoiser), ModelCost.of(denoiser.model), denoiser.work.copy()
    assert cost is not None
    with FlopCounterMode(display=False) as counter:
        head.train(sampled, torch.tensor([0.1, 0.2, 0.3]).double())
    work = denoiser.work - before
    assert work.value_rows == 2 * UPDATES * 3 * 4
    assert cost.training(work) == counter.get_total_flops() > 0
    before = denoiser.work.copy()
    with FlopCounterMode(display=False) as counter:
        head.predict(States.from_selection(sampled, torch.tensor([[0, 1]] * 3)))
    assert cost.forward(denoiser.work - before) == counter.get_total_flops() > 0


# --- The policy's gradient


@pytest.mark.parametrize("returns", ["joint", "split"])
def test_any_head_that_stands_still_keeps_the_gradient_exact(
    returns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(config: AlgorithmConfig, denoiser: Denoiser, processes: Processes) -> ValueHead:
        head = ValueHead(config, denoiser, processes)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in head.linear.parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn)
        return head

    monkeypatch.setattr(ValueHead, "of", of)
    monkeypatch.setattr(ValueHead, "train", lambda *_: {})
    changes = {**PRESET["egspo-sa"], "step_values": "head", "returns": returns}
    enumerated = Problem(changes, reward=smooth)
    exact = enumerated.exact()
    estimate, outcomes = enumerated.estimate()
    assert relative_error(estimate, exact) < 1e-6
    plain = [o.gradient for o in Problem({**changes, "lam": 0.0}, reward=smooth).estimate()[1]]
    differ = [
        not torch.allclose(o.gradient, p, atol=1e-9) for o, p in zip(outcomes, plain, strict=True)
    ]
    assert any(differ)  # of a single group the head does matter


def test_the_update_does_not_feel_the_head_being_trained(tmp_path: Path) -> None:
    def steps(rate: float) -> list[dict[str, Any]]:
        changes = {"algorithm": {**HEAD["algorithm"], "value_learning_rate": rate}}
        trainer = Trainer(runs.config(tmp_path / str(rate), changes))
        return [merge([trainer.iteration.run(step, [0, 1, 2], 12 * step)]) for step in (1, 2)]

    slow, fast = steps(1e-9), steps(0.5)
    for name in ("loss", "grad_norm", "advantage/std", "flops/update", "value/loss"):
        assert slow[0][name] == fast[0][name], name
    assert slow[1]["value/loss"] != fast[1]["value/loss"]
    assert slow[1]["grad_norm"] != fast[1]["grad_norm"]
    assert "step_reward/mean" not in fast[0] and fast[0]["flops/rollout"] > 0


# --- A run


def test_a_resumed_run_is_the_same(tmp_path: Path, no_plots: None) -> None:
    changes = [HEAD, {"checkpoint": {"every": 1, "keep_last": 4}}]
    train(runs.config(tmp_path / "whole", *changes))
    (tmp_path / "part").mkdir()
    half = runs.config(tmp_path / "part", *changes)
    half.steps = 2
    train(half)
    half.steps = 4
    train(half, resume=tmp_path / "part")
    assert runs.outcome(tmp_path / "whole") == runs.outcome(tmp_path / "part")
    heads = []
    for name in ("whole", "part"):
        newest = find_checkpoint(tmp_path / name)
        heads.append(torch.load(newest / VALUE_FILE, weights_only=True))
        assert not list((tmp_path / name / "final").rglob(f"*{VALUE_FILE}*"))
    assert torch.equal(heads[0]["head"]["weight"], heads[1]["head"]["weight"])
    assert float(heads[0]["head"]["weight"].abs().max()) > 0
    for one, other in zip(*(h["optimizer"]["state"].values() for h in heads), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    records = read_metrics(tmp_path / "whole")[1:]
    assert all(r["value/loss"] is not None and "step_reward/mean" not in r for r in records)

    for folder in list_checkpoints(tmp_path / "part" / "checkpoints"):
        assert (folder / VALUE_FILE).is_file()
    other = Trainer(runs.config(tmp_path / "wide", {"model": {"config": {"d_model": 32}}}, HEAD))
    assert other.iteration.values is not None
    with pytest.raises(CheckpointError, match="does not fit the model"):
        other.iteration.values.load(find_checkpoint(tmp_path / "whole"))
    with pytest.raises(CheckpointError, match=f"has no {VALUE_FILE}"):
        other.iteration.values.load(tmp_path)
    newest = find_checkpoint(tmp_path / "part")
    values = Trainer(runs.config(tmp_path / "fresh", HEAD)).iteration.values
    assert values is not None
    damaged = torch.load(newest / VALUE_FILE, weights_only=True)
    damaged["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(damaged, tmp_path / VALUE_FILE)
    with pytest.raises(CheckpointError, match="moments are not of the shape"):
        values.load(tmp_path)


def test_a_head_that_has_learned_is_not_saved_with_the_step_before(
    tmp_path: Path, no_plots: None
) -> None:
    """Of equal rewards, so that nothing but the head changes in a step."""

    def same(completions: Sequence[str], **_: Any) -> list[float]:
        return [0.5 for _ in completions]

    def fail() -> None:
        raise RuntimeError("behind the update")

    runs.rewards[:] = [Reward("same", same)]
    undo = runs.strike("egspo.algorithm.iteration.peak_memory", 2, fail)
    changes = {"algorithm": {**HEAD["algorithm"], "lam": 0.0}, "checkpoint": {"every": 0}}
    try:
        with pytest.raises(RuntimeError, match="behind the update"):
            train(runs.config(tmp_path, runs.LETTERS, changes))
    finally:
        undo()
        runs.rewards.clear()
    assert [record.get("updates") for record in read_metrics(tmp_path)] == [None, 0]
    assert not list_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"stepwise": False}}, r"needs algorithm\.stepwise: true"),
        ({"algorithm": {"objective": "mean_field"}}, r"needs algorithm\.stepwise: false"),
        ({"algorithm": {"one_step": "rollout"}}, r"algorithm\.one_step \(rollout\) is about"),
        ({"algorithm": {"completion_blocks": "active"}}, r"completion_blocks \(active\) is about"),
        ({"algorithm": {"value_learning_rate": 0.0}}, "must be > 0, got 0.0"),
        ({"pipeline": True}, r"algorithm\.step_values: completions"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        runs.config(tmp_path, HEAD, changes)


def test_a_learning_rate_without_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is of algorithm\.step_values: head"):
        runs.config(tmp_path, {"algorithm": {"value_learning_rate": 0.1}})
