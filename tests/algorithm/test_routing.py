"""Experts of the rollout: recorded as they were chosen, compared in replay, and taken there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.helpers.runs as runs
from egspo.algorithm.micro_batches import MicroBatches
from egspo.algorithm.replay import Scorer, Scores
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig
from egspo.config.convert import ConfigError
from egspo.models.routes import Routes
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout_blocks
from egspo.rollouts.trajectory import Trajectory
from egspo.runs.metrics import read_metrics
from egspo.tasks import Reward
from egspo.training.trainer import train
from tests.algorithm.test_causal_policy import GENERATION, prompts_of, small_denoiser
from tests.families import new_fields
from tests.helpers.runs import LETTERS, config

EXPERTS = ("sdar_moe", "llada2")
LENGTHS = [3, 9, 9, 6, 8]


def sampled(denoiser: Denoiser, batch_size: int = 16) -> Trajectory:
    generation = replace(GENERATION, early_exit=False, batch_size=batch_size)
    for block in rollout_blocks(  # noqa: B007 - the last one counts
        *(denoiser, prompts_of(LENGTHS), generation),
        seed=1,
        sequence_ids=torch.arange(len(LENGTHS)),
        experts=True,
    ):
        pass
    return block.trajectory


def states_of(trajectory: Trajectory) -> States:
    selected = torch.tensor([[0, 2, 5], [1, 2, -1], [4, 0, 3], [5, 1, -1], [3, 5, 0]])
    return States.from_selection(trajectory, selected)


def replayed(denoiser: Denoiser, states: States, *, taken: bool) -> tuple[Scorer, Scores]:
    scorer = Scorer(denoiser, AlgorithmConfig(beta=0.0, replay_experts=taken), GENERATION)
    limit = MicroBatches(4, None, GENERATION, 0, causal=True)
    return scorer, scorer.replay(states, limit.plan(states, ranks=None), complete=False)


def whole(denoiser: Denoiser, ids: Tensor) -> Tensor:
    """Experts int16 [n, R, K] of a sequence, in a pass of its own."""
    routes = Routes()
    with torch.no_grad():
        denoiser.model(ids[None], routes=routes, compute_logits=False)
    return routes.stacked()[0]


def same(mine: Tensor, theirs: Tensor) -> bool:
    """The same experts, in any order."""
    return torch.equal(mine.sort(-1).values, theirs.sort(-1).values)


@pytest.mark.parametrize("batch_size", [16, 2])
@pytest.mark.parametrize("family", EXPERTS)
def test_a_rollout_records_the_experts_of_every_pass(family: str, batch_size: int) -> None:
    """In float64, against passes over whole sequences."""
    denoiser = small_denoiser(family, torch.float64)
    trajectory = sampled(denoiser, batch_size)
    experts, size = trajectory.experts, GENERATION.block_length
    assert experts is not None and experts.steps.dtype == torch.int16
    assert experts.steps.shape[-2:] == experts.clean.shape[-2:] == denoiser.experts == (2, 2)
    width = trajectory.prompts.ids.shape[1]
    for row, length in enumerate(LENGTHS):
        prompt = trajectory.prompts.ids[row, width - length :]
        for step in range(int(trajectory.steps[row])):
            state = States.from_selection(trajectory, torch.tensor([[-1]] * row + [[step]]))
            start = int(state.block_starts(size, causal=True))
            known = torch.cat([prompt, trajectory.tokens[row, : max(start, 0)]])
            canvas = trajectory.canvas(state.row, state.step)[0]
            ids = torch.cat([prompt, canvas])[: length + start + size]
            own = whole(denoiser, ids)[length + start :]
            assert same(experts.steps[row, step, : len(own)], own), (row, step)
            if length + start > 0:
                clean = whole(denoiser, known[: length + start])
                assert same(experts.clean[row, width - length :][: len(clean)], clean), (row, step)


@pytest.mark.parametrize("family", EXPERTS)
def test_replay_and_update_take_the_experts_of_the_rollout(family: str) -> None:
    denoiser = small_denoiser(family)
    trajectory = sampled(denoiser)
    assert trajectory.experts is not None
    states = states_of(trajectory)
    results = []
    for taken in (False, True):
        scorer, scores = replayed(denoiser, states, taken=taken)
        agreed, total = denoiser.agreement.take()
        assert agreed == total > 0
        assert scores.old_log_prob is not None
        recorded = trajectory.log_prob[states.row, states.step].double()
        torch.testing.assert_close(scores.old_log_prob, recorded, rtol=0, atol=1e-5)
        results.append(scores.old_log_prob)
        denoiser.model.zero_grad()
        one = torch.ones(len(states), dtype=torch.float64)
        outcome = scorer.surrogate(states, torch.arange(len(states)), scores, one, 1.0)
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        results.append(denoiser.model.get_input_embeddings().weight.grad.clone())  # type: ignore[operator]
        denoiser.agreement.take()
    # Of one token the same experts, perhaps added up in another order.
    for chosen, replayed_ones in (results[::2], results[1::2]):
        torch.testing.assert_close(replayed_ones, chosen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", EXPERTS)
def test_a_route_that_differs_is_counted_and_replayed_if_asked(
    family: str, checkpointing: bool
) -> None:
    """The block of one state went elsewhere in the first layer with experts, it is said."""
    denoiser = small_denoiser(family, torch.float64)
    if checkpointing:
        denoiser.model.checkpoint_activations()  # type: ignore[operator]
    trajectory = sampled(denoiser)
    states = states_of(trajectory)
    experts = trajectory.experts
    assert experts is not None
    before = replayed(denoiser, states, taken=True)[1].old_log_prob
    total = denoiser.agreement.take()[1]
    row, step = int(states.row[3]), int(states.step[3])
    own = experts.steps[row, step, :, 0]
    other = (own + 1) % 8
    start = int(states.block_starts(GENERATION.block_length, causal=True)[3])
    inside = slice(0, GENERATION.max_new_tokens - start)  # of the columns of the block
    flipped = (other.sort(-1).values != own.sort(-1).values).any(-1)[inside].sum()
    experts.steps[row, step, :, 0] = other
    moved = {}
    for taken in (False, True):
        scorer, scores = replayed(denoiser, states, taken=taken)
        agreed, count = denoiser.agreement.take()
        assert (count == total and total - agreed == flipped) or taken
        assert scores.old_log_prob is not None and before is not None
        moved[taken] = (scores.old_log_prob - before).abs() > 1e-9
        outcome = scorer.surrogate(
            states, torch.tensor([3]), scores, torch.ones(len(states)).double(), 1.0
        )
        assert torch.allclose(outcome.ratio, torch.ones_like(outcome.ratio), rtol=1e-9)
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        denoiser.agreement.take()
    assert not moved[False].any()
    assert moved[True].nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("taken", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_says_how_many_routes_agree(
    taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None
) -> None:
    monkeypatch.setattr(runs, "rewards", [Reward("ones", runs.ones)])
    fields = {"model": {"config": new_fields("sdar_moe")}}
    changes: Any = {"steps": 2, "algorithm": {"replay_experts": taken, "stepwise": taken}}
    train(config(tmp_path / "run", LETTERS, {"model": {"config": None}}, fields, changes))
    for record in read_metrics(tmp_path / "run")[1:]:
        assert record["routing/agreement"] == 1.0


def test_experts_of_a_model_without_any_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "rewards", [Reward("ones", runs.ones)])
    fields = {"model": {"config": new_fields("sdar")}}
    changes: Any = {"algorithm": {"replay_experts": True}}
    with pytest.raises(ValueError, match="replay_experts is of models with experts, and sdar has"):
        train(config(tmp_path / "run", LETTERS, {"model": {"config": None}}, fields, changes))
    for wrong in (
        {"generation": {"cuda_graphs": True}},
        {"algorithm": {"objective": "mean_field", "stepwise": False}},
    ):
        with pytest.raises(ConfigError, match=r"algorithm\.replay_experts"):
            config(tmp_path / "run", LETTERS, changes, wrong)
