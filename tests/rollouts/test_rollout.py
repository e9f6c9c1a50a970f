"""Rollout: schedule, unmasking order, sampling and what is recorded, on the enumerable model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egspo.algorithm.replay import Scorer
from egspo.algorithm.states import States
from egspo.config import GenerationConfig
from egspo.rollouts.engine import rollout
from egspo.rollouts.trajectory import PromptBatch, Trajectory
from egspo.rollouts.unmasking import POLICIES, schedule
from tests.algorithm.test_enumeration import ALGORITHM
from tests.helpers.marks import slow_but
from tests.helpers.toy import (
    MASK,
    PROMPT,
    enumerate_trajectories,
    toy_denoiser,
    with_policy,
)

CONFIG = GenerationConfig(
    max_new_tokens=4,
    steps=4,
    block_length=2,
    temperature=0.8,
    batch_size=512,
    early_exit=False,
)


def run(
    config: GenerationConfig, count: int, seed: int = 0, first: int = 0, **options
) -> Trajectory:
    denoiser = options.pop("denoiser", None) or toy_denoiser(config.max_new_tokens)
    prompts = PromptBatch.from_lists([PROMPT] * count, 0)
    ids = torch.arange(first, first + count)
    return rollout(denoiser, prompts, config, seed=seed, sequence_ids=ids, **options)


@given(blocks=st.integers(1, 5), block_length=st.integers(1, 40), data=st.data())
def test_schedule_reveals_every_position_once(
    blocks: int, block_length: int, data: st.DataObject
) -> None:
    per_block = data.draw(st.integers(1, block_length))
    plan = schedule(blocks * block_length, blocks * per_block, block_length)
    assert len(plan) == blocks * per_block
    for block in range(blocks):
        steps = [s for s in plan if s.start == block * block_length]
        quotas = [s.quota for s in steps]
        assert sum(quotas) == block_length == steps[0].masked
        assert quotas == sorted(quotas, reverse=True) and quotas[0] - quotas[-1] <= 1
        assert [s.masked for s in steps] == [
            block_length - sum(quotas[:i]) for i in range(len(steps))
        ]


@pytest.mark.parametrize(
    ("length", "steps", "block"), [(0, 1, 1), (4, 0, 2), (5, 2, 2), (4, 3, 2), (4, 8, 2), (4, 4, 0)]
)
def test_schedule_refuses(length: int, steps: int, block: int) -> None:
    with pytest.raises(ValueError, match=r"length|steps|block"):
        schedule(length, steps, block)


@pytest.mark.parametrize("policy", slow_but({"entropy_bounded", "max_prob"}, sorted(POLICIES)))
def test_trajectories_and_probabilities_are_the_enumerated_ones(policy: str) -> None:
    config = with_policy(replace(CONFIG, block_length=4, steps=2), policy, bound=2.2)
    denoiser = toy_denoiser(4)
    enumeration = enumerate_trajectories(denoiser, config)
    keys = zip(
        enumeration.trajectory.tokens.tolist(),
        enumeration.trajectory.unmask_step.tolist(),
        strict=True,
    )
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for (tokens, when), p in zip(keys, enumeration.probability.tolist(), strict=True):
        key = (tuple(tokens), tuple(when))
        known[key] = known.get(key, 0.0) + p
    count = 4096
    sampled = run(config, count, seed=3)
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for tokens, when in zip(sampled.tokens.tolist(), sampled.unmask_step.tolist(), strict=True):
        key = (tuple(tokens), tuple(when))
        seen[key] = seen.get(key, 0) + 1
    assert seen.keys() <= known.keys()
    # Chi-square over outcomes expected at least 5 times, the rest pooled.
    pooled_expected = pooled_seen = statistic = 0.0
    cells = 0
    for key, p in known.items():
        expected, observed = count * p, seen.get(key, 0)
        if expected < 5:
            pooled_expected, pooled_seen = pooled_expected + expected, pooled_seen + observed
        else:
            statistic, cells = statistic + (observed - expected) ** 2 / expected, cells + 1
    if pooled_expected > 0:
        statistic += (pooled_seen - pooled_expected) ** 2 / pooled_expected
    # Mean `cells`, standard deviation sqrt(2 cells): four of them.
    assert statistic < cells + 4 * (2 * cells) ** 0.5 + 4


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_recorded_log_prob_is_the_replayed_one(policy: str) -> None:
    config = with_policy(CONFIG, policy)
    denoiser = toy_denoiser(4)
    sampled = run(config, 64, denoiser=denoiser)
    states = States.from_selection(sampled, torch.arange(4).expand(64, -1))
    scorer = Scorer(denoiser, ALGORITHM, config)
    scores = scorer.replay(states, states.micro_batches(100, ranks=None), complete=False)
    recorded = sampled.log_prob[states.row, states.step]
    torch.testing.assert_close(scores.old_log_prob, recorded, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_sequence_does_not_depend_on_its_batch(policy: str) -> None:
    config = with_policy(CONFIG, policy)
    together = run(config, 9)
    split = run(replace(config, batch_size=2), 9)
    alone = run(config, 1, first=5)
    for a, b, rows in ((together, split, slice(None)), (together, alone, slice(5, 6))):
        assert torch.equal(a.tokens[rows], b.tokens)
        assert torch.equal(a.unmask_step[rows], b.unmask_step)
        assert torch.equal(a.log_prob[rows], b.log_prob)
        assert torch.equal(a.entropy[rows], b.entropy)
    assert len({tuple(row) for row in together.tokens.tolist()}) > 1


def test_mask_is_never_sampled_even_if_most_likely() -> None:
    denoiser = toy_denoiser(4)
    with torch.no_grad():
        denoiser.model.table[..., MASK] += 50.0
    for policy in POLICIES:
        for temperature in (0.0, 1.0):
            config = with_policy(replace(CONFIG, temperature=temperature), policy)
            sampled = run(config, 64, denoiser=denoiser)
            assert int((sampled.tokens == MASK).sum()) == 0
            assert bool(sampled.log_prob.isfinite().all())


def test_canvases_are_reconstructed() -> None:
    sampled = run(CONFIG, 5)
    rows = torch.arange(5)
    assert bool((sampled.canvas(rows, torch.zeros(5, dtype=torch.int64)) == MASK).all())
    assert torch.equal(sampled.canvas(rows, torch.full((5,), 4)), sampled.tokens)
    middle = sampled.canvas(rows, torch.full((5,), 2))
    # Two steps of one token each have finished the first block and nothing else.
    assert torch.equal(middle[:, :2], sampled.tokens[:, :2])
    assert bool((middle[:, 2:] == MASK).all())
    assert sampled.unmask_step.dtype == torch.int16


def test_greedy_is_deterministic_and_takes_the_mode() -> None:
    config = replace(CONFIG, temperature=0.0, policy="max_prob")
    denoiser = toy_denoiser(4)
    first, second = (run(config, 3, seed=seed, denoiser=denoiser) for seed in (0, 1))
    assert torch.equal(first.tokens, second.tokens)
    assert bool((first.tokens == first.tokens[0]).all())
    canvas = first.canvas(torch.tensor([0]), torch.tensor([0]))
    step0 = (first.unmask_step[0] == 0).nonzero()[0, 0]
    logits = denoiser.model.logits(canvas)[0, :, :MASK]  # type: ignore[operator]
    assert int(first.tokens[0, step0]) == int(logits[step0].argmax())
    assert bool((first.log_prob == 0).all())


@pytest.mark.parametrize("over", ["revealed", "block", "masked"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_step_entropy(over: str, reduce: str, temperature: float) -> None:
    denoiser = toy_denoiser(4)
    config = replace(CONFIG, steps=2)
    sampled = run(
        config,
        6,
        denoiser=denoiser,
        entropy_over=over,
        entropy_reduce=reduce,
        entropy_temperature=temperature,
    )
    for row in range(6):
        for step in range(2):
            canvas = sampled.canvas(torch.tensor([row]), torch.tensor([step]))
            probs = (denoiser.model.logits(canvas)[0, :, :MASK] / temperature).softmax(1)  # type: ignore[operator]
            entropy = -(probs * probs.log()).sum(1).detach()
            revealed = sampled.unmask_step[row] == step
            masked = sampled.unmask_step[row] >= step
            block = torch.arange(4) // 2 == step
            chosen = {"revealed": revealed, "block": masked & block, "masked": masked}[over]
            value = entropy[chosen].mean() if reduce == "mean" else entropy[chosen].sum()
            assert float(sampled.entropy[row, step]) == pytest.approx(float(value), abs=1e-9)


def test_lengths_stop_at_the_first_eos() -> None:
    sampled = run(CONFIG, 200)
    for tokens, length in zip(sampled.tokens.tolist(), sampled.lengths.tolist(), strict=True):
        assert length == (tokens.index(2) if 2 in tokens else 4)


def test_nan_logits_are_an_error() -> None:
    denoiser = toy_denoiser(4)
    with torch.no_grad():
        denoiser.model.table[5] = float("nan")
        denoiser.model.table[-1] = float("nan")
    with pytest.raises(FloatingPointError, match="denoising step 0"):
        run(CONFIG, 2, denoiser=denoiser)
