"""Trajectories that share the columns of a prompt: as passes of their own, to rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo.algorithm.micro_batches import Columns, MicroBatches
from egspo.algorithm.replay import Scorer, Scores
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, TrainConfig
from egspo.config.convert import from_mapping
from egspo.models import add_lora
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout_blocks
from egspo.rollouts.trajectory import PromptBatch
from egspo.training.build import check_model
from tests.algorithm.test_causal_policy import GENERATION, MASK_ID, prompts_of, small_denoiser
from tests.families import BLOCK_CAUSAL, disturb, make

LENGTHS = [3, 21, 9, 6, 8]
MEMBERS = [1, 2, 1, 4, 0, 1, 2]
"""Prompt of each trajectory: one of whole blocks, others with tails, one shorter than a block."""


def states_of(denoiser: Denoiser) -> States:
    prompts = prompts_of(LENGTHS)
    members = torch.tensor(MEMBERS)
    for block in rollout_blocks(  # noqa: B007 - the last one counts
        *(denoiser, PromptBatch(prompts.ids[members], prompts.mask[members])),
        replace(GENERATION, early_exit=False),
        seed=1,
        sequence_ids=torch.arange(len(MEMBERS)),
        experts=denoiser.experts is not None,
    ):
        pass
    selected = [[0, 2, 5], [1, 2, -1], [4, 0, 3], [5, 1, -1], [3, 5, 0], [0, 1, 2], [2, 4, 5]]
    return States.from_selection(block.trajectory, torch.tensor(selected))


def adapted(family: str, dtype: torch.dtype) -> Denoiser:
    """With an adapter that has left where it began."""
    model: Any = make(family, max_position_embeddings=256).to(dtype)
    model = add_lora(model, rank=2, alpha=8, dropout=0.0, seed=0).to(dtype)
    model = disturb(model, std=0.1)
    return Denoiser(model, mask_id=MASK_ID, eos_id=1, pad_id=1)


def scored(
    denoiser: Denoiser, states: States, **algorithm: Any
) -> tuple[Scores, list[Tensor], list[Tensor]]:
    """Scores, ratios and gradients of all states in micro-batches of ten."""
    config = AlgorithmConfig(**algorithm)
    scorer = Scorer(denoiser, config, GENERATION)
    limit = MicroBatches(10, None, GENERATION, 0, True, config.share_prompts)
    groups = limit.plan(states, ranks=None)
    scores = scorer.replay(states, groups, complete=True, limit=limit)
    columns = Columns.of(states, GENERATION, 0, True, config.share_prompts)
    advantage = torch.randn(len(states), generator=torch.Generator().manual_seed(0)).double()
    denoiser.model.zero_grad()
    ratios, passes = [], []
    for index in groups[0]:
        before = denoiser.work.copy()
        outcome = scorer.surrogate(states, index, scores, advantage, 1.0)
        made, expected = denoiser.work - before, columns.work(index.tolist())
        assert (made.tokens, made.pairs) == (expected.tokens, expected.pairs)
        assert made.spared_columns == expected.spared_columns
        assert made.forwards == 1 + columns.shares(index.tolist())
        passes.append(made.forwards)
        ratios.append(outcome.ratio)
        outcome.loss.backward()  # type: ignore[no-untyped-call]
    assert passes[0] == (1 if config.share_prompts == "never" else 2)
    return (
        scores,
        ratios,
        [p.grad.clone() for p in denoiser.model.parameters() if p.grad is not None],
    )


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "adapter"])
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_sharing_gives_what_passes_of_their_own_do(family: str, kind: str) -> None:
    """Log-probabilities, reference, completions and gradients; the first ratio is 1."""
    dtype = torch.float64
    denoiser = adapted(family, dtype) if kind == "adapter" else small_denoiser(family, dtype)
    if kind == "checkpointed":
        denoiser.model.checkpoint_activations()  # type: ignore[operator]
    states = states_of(denoiser)
    changes = {"beta": 0.1 if kind == "adapter" else 0.0}
    apart, _, expected = scored(denoiser, states, share_prompts="never", **changes)
    for share in ("auto", "always"):
        together, ratios, gradients = scored(denoiser, states, share_prompts=share, **changes)
        for ratio in ratios:
            assert torch.equal(ratio, torch.ones_like(ratio))
        close = {"rtol": 0, "atol": 1e-9}
        torch.testing.assert_close(together.old_log_prob, apart.old_log_prob, **close)
        torch.testing.assert_close(together.ref_log_prob, apart.ref_log_prob, **close)
        assert together.completions is not None and apart.completions is not None
        assert torch.equal(together.completions, apart.completions)
        assert len(gradients) == len(expected) > 0
        for mine, theirs in zip(gradients, expected, strict=True):
            scale = max(float(theirs.abs().max()), 1.0)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7 * scale)


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("family", ["sdar_moe", "llada2"])
def test_experts_of_the_rollout_are_those_of_shared_passes(family: str, taken: bool) -> None:
    denoiser = small_denoiser(family, torch.float64)
    states = states_of(denoiser)
    scorer = Scorer(
        denoiser,
        AlgorithmConfig(beta=0.0, share_prompts="always", replay_experts=taken),
        GENERATION,
    )
    every = torch.arange(len(states))
    before = scorer.replay(states, [[every]], complete=False).old_log_prob
    agreed, total = denoiser.agreement.take()
    assert agreed == total > 0
    experts = states.trajectory.experts
    assert experts is not None
    # The first block of a prompt that three trajectories share went elsewhere, it is said.
    rows = [row for row, prompt in enumerate(MEMBERS) if prompt == 1]
    columns = slice(0, 4)
    experts.clean[rows, columns, 0] = (experts.clean[rows, columns, 0] + 1) % 8
    after = scorer.replay(states, [[every]], complete=False).old_log_prob
    agreed, count = denoiser.agreement.take()
    assert count == total and (taken or 0 < total - agreed <= 4)  # once, and not for each
    assert before is not None and after is not None
    # The block that shares a column with a state of another prompt is left alone.
    moved = ((after - before).abs() > 1e-9).tolist()
    assert moved == [taken and row in rows for row in states.row.tolist()]


def test_prompts_are_shared_where_that_spares_columns() -> None:
    """In blocks of four: three trajectories behind eighteen tokens, and one behind sixteen."""
    row, prompt, start = [0, 0, 1, 2, 3], [18, 18, 18, 18, 16], [-2, 6, 2, 2, 4]
    never = Columns(GENERATION, 0, row, prompt, start, causal=True, answered=[0, 0, 0, 0, 1])
    auto, always = (replace(never, share_prompts=share) for share in ("auto", "always"))
    assert not never.shares([0, 1, 2, 3])
    assert never.count([0, 1, 2]) == 2 * (18 + 6 + 2 * 4)
    # Sixteen columns of the prompt once, the others of each behind it, and copies.
    assert auto.shares([0, 1, 2]) and auto.count([0, 1, 2]) == 16 + 2 * (2 + 6 + 2 * 4)
    assert auto.work([0, 1, 2]).spared_columns == 16
    # Beside one of another prompt it spares less than a fifth: the longest tail is in every row.
    assert not auto.shares([2, 3, 4]) and auto.count([2, 3, 4]) == 3 * (18 + 4 + 4)
    assert always.count([2, 3, 4]) == 2 * 18 + 3 * (2 + 4 + 4)
    # Without a prompt in common, only what is asked for.
    assert not auto.shares([0, 1]) and not auto.shares([3, 4])
    assert always.shares([0]) and always.count([0]) == 16 + (2 - 2 + 4)
    # A limit on columns has room for more states.
    assert auto.packed([0, 1, 2], 50) == [[0, 1, 2]]
    assert never.packed([0, 1, 2], 50) == [[0, 1], [2]]


def test_a_sharded_run_shares_only_if_asked() -> None:
    asked = {share: AlgorithmConfig(share_prompts=share) for share in ("auto", "always", "never")}  # type: ignore[arg-type]
    assert [a.sharing(sharded=True) for a in asked.values()] == ["never", "always", "never"]
    assert [a.sharing(sharded=False) for a in asked.values()] == list(asked)


def test_full_attention_has_nothing_to_share() -> None:
    tree = {"model": {"path": "none"}, "algorithm": {"share_prompts": "always"}}
    run = from_mapping(TrainConfig, tree, "recipe")
    with pytest.raises(ValueError, match="share_prompts: always is of block-causal models"):
        check_model(run, make("llada").config)
