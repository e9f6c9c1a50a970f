"""Step selection on trajectories."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egspo.algorithm.selection import (
    _shared,
    _spread,
    candidate_limits,
    histogram,
    select,
    select_share,
    step_confidence,
)
from egspo.rollouts.trajectory import NEVER, PromptBatch, Trajectory

EOS = 9


def trajectory(
    tokens: list[list[int]], unmask: list[list[int]], entropy: list[list[float]]
) -> Trajectory:
    return Trajectory(
        prompts=PromptBatch.from_lists([[1]] * len(tokens), 0),
        tokens=torch.tensor(tokens),
        unmask_step=torch.tensor(unmask, dtype=torch.int16),
        entropy=torch.tensor(entropy),
        confidence=torch.zeros(len(tokens), len(tokens[0])),
        token_entropy=torch.zeros(len(tokens), len(tokens[0])),
        log_prob=torch.zeros(len(tokens), len(entropy[0])),
        steps=torch.full((len(tokens),), len(entropy[0])),
        lengths=torch.zeros(len(tokens), dtype=torch.int64),
        mask_id=8,
    )


SAMPLE = trajectory(
    [[1, 2, EOS, EOS], [3, EOS, 4, 5], [EOS] * 4],
    [[1, 0, 2, 3], [0, 1, 3, 2], [0, 1, 2, 3]],
    [[0.1, 0.4, 0.9, 0.8], [0.5, 0.5, 0.2, 0.7], [1.0, 2.0, 3.0, 4.0]],
)


def test_limits() -> None:
    assert candidate_limits(SAMPLE, EOS, stop_at_eos=True).tolist() == [2, 4, 0]
    assert candidate_limits(SAMPLE, EOS, stop_at_eos=False).tolist() == [4, 4, 4]


def test_high_entropy_stops_at_eos_and_pads() -> None:
    limits = candidate_limits(SAMPLE, EOS, stop_at_eos=True)
    selected = select(SAMPLE, "high_entropy", 3, limits=limits)
    assert selected.tolist() == [[1, 0, -1], [3, 0, 1], [-1, -1, -1]]
    assert histogram(selected, 4).tolist() == [2, 2, 0, 1]


def fewest(entropy: list[float], limit: int, share: float, most: int) -> list[int]:
    """By the definition, in exact arithmetic: steps are added until they hold the share."""
    value = [Fraction(0 if math.isnan(h) else h) for h in entropy[:limit]]
    # Ties go to the earlier step, and NaN after all numbers.
    order = sorted(range(limit), key=lambda s: (math.isnan(entropy[s]), -value[s], s))
    chosen: list[int] = []
    while sum(value[s] for s in chosen) < Fraction(share) * sum(value):
        chosen.append(order[len(chosen)])
    return (chosen[:most] + [-1] * most)[:most]


# Binary fractions, of which floating point makes no rounding; with ties, zeros and NaN.
ENTROPIES = st.sampled_from([0.0, 0.25, 0.25, 0.5, 1.0, 1.75, 3.0, math.nan])


@given(
    rows=st.lists(st.tuples(st.lists(ENTROPIES, min_size=7, max_size=7), st.integers(0, 7))),
    share=st.sampled_from([0.0625, 0.25, 0.5, 0.75, 1.0]),
    most=st.integers(1, 7),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_share_of_the_entropy_by_the_fewest_steps(
    rows: list[tuple[list[float], int]], share: float, most: int, dtype: torch.dtype
) -> None:
    entropy = torch.tensor([row for row, _ in rows], dtype=dtype).view(-1, 7)
    limits = torch.tensor([limit for _, limit in rows], dtype=torch.int64)
    selected = select_share(entropy, share, most, limits=limits)
    assert selected.tolist() == [fewest(row, limit, share, most) for row, limit in rows]


def test_a_share_of_any_entropies_is_held_and_one_step_less_would_not_do() -> None:
    torch.manual_seed(0)
    entropy = torch.rand(200, 30) ** 4
    for share in (0.3, 0.7, 0.999):
        selected = select_share(entropy, share, 30, limits=torch.full((200,), 30))
        chosen = selected >= 0
        held = entropy.gather(1, selected.clamp(min=0)).double().where(chosen, 0.0)
        wanted = share * entropy.double().sum(1)
        assert bool((held.sum(1) >= wanted - 1e-9).all())
        last = held.gather(1, chosen.sum(1, keepdim=True) - 1)[:, 0]
        assert bool((held.sum(1) - last < wanted + 1e-9).all())
        assert len(chosen.sum(1).unique()) > 3


def test_a_share_is_of_the_candidates_and_of_the_highest_entropies_only() -> None:
    limits = candidate_limits(SAMPLE, EOS, stop_at_eos=True)
    selected = select(SAMPLE, "high_entropy", 3, limits=limits, entropy_share=0.7)
    # Of 0.1 + 0.4 before the EOS, and of 0.5 + 0.5 + 0.2 + 0.7; the third row has no candidate.
    assert selected.tolist() == [[1, -1, -1], [3, 0, 1], [-1, -1, -1]]
    with pytest.raises(ValueError, match="entropy_share needs strategy 'high_entropy', got 'all'"):
        select(SAMPLE, "all", 3, limits=limits, entropy_share=0.7)


@given(
    limits=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    k=st.integers(1, 20),
    strategy=st.sampled_from(["uniform", "random", "all"]),
)
def test_ablations_take_distinct_candidates_with_the_last(
    limits: list[int], k: int, strategy: str
) -> None:
    count, steps = len(limits), 20
    sample = trajectory([[1]] * count, [[0]] * count, [[0.0] * steps] * count)
    selected = select(
        sample, strategy, k, limits=torch.tensor(limits), seed=1, sequence_ids=torch.arange(count)
    )
    for row, limit in zip(selected.tolist(), limits, strict=True):
        chosen = [s for s in row if s >= 0]
        wanted = limit if strategy == "all" else min(k, limit)
        assert len(chosen) == len(set(chosen)) == wanted
        assert all(0 <= s < limit for s in chosen)
        assert not chosen or limit - 1 in chosen
        assert row[: len(chosen)] == chosen
        if strategy == "uniform" and len(chosen) > 1:
            gaps = [b - a for a, b in itertools.pairwise(chosen)]
            assert max(gaps) - min(gaps) <= 1


def test_random_is_keyed_by_sequence() -> None:
    sample = trajectory([[1]] * 50, [[0]] * 50, [[0.0] * 20] * 50)
    limits = torch.full((50,), 20)
    one, two = (
        select(sample, "random", 4, limits=limits, seed=0, sequence_ids=torch.arange(50) + offset)
        for offset in (0, 10)
    )
    assert torch.equal(one[10:], two[:40])
    # Every step but the last is as likely as another: 3 of 19 in 50 rows.
    assert histogram(one, 20)[-1] == 50
    assert histogram(one, 20)[:-1].max() < 25


@pytest.mark.parametrize("k", [0, -1, 5])
def test_bad_k(k: int) -> None:
    with pytest.raises(ValueError, match="k must lie in"):
        select(SAMPLE, "uniform", k, limits=torch.tensor([4, 4, 4]))


def test_uniform_reference_takes_what_the_published_code_takes() -> None:
    limits = torch.tensor([128, 8, 3, 0])
    (whole, eight, three, none) = _spread(limits, 8).tolist()
    assert whole == [0, 21, 42, 63, 84, 105, 126, 127]
    assert eight == list(range(8))
    assert three == [0, 1, 2, -1, -1, -1, -1, -1] and none == [-1] * 8
    assert _spread(torch.tensor([128]), 1).tolist() == [[127]]


def test_random_reference_is_shared_by_the_batch_with_the_last_step_in() -> None:
    limits = torch.tensor([128] * 3)
    drawn = [_shared(limits, 8, 0, step) for step in range(400)]
    for selected in drawn:
        assert (selected == selected[0]).all()
        assert (selected[:, -1] == 127).all()
        assert ((selected[:, :-1] >= 0) & (selected[:, :-1] <= 126)).all()
    others = torch.cat([selected[0, :-1] for selected in drawn])
    assert set(others.tolist()) == set(range(127))
    # With replacement: 7 of 127 repeat in 15 % of the draws, 60 of 400 on average.
    repeats = sum(len(set(selected[0, :-1].tolist())) < 7 for selected in drawn)
    assert 30 <= repeats <= 95
    assert drawn[0].tolist() != drawn[1].tolist()
    assert _shared(torch.tensor([1, 0]), 3, 0, 5).tolist() == [[-1, -1, 0], [-1, -1, -1]]


def test_sign_aware_takes_the_unsure_steps_of_good_and_the_sure_ones_of_bad_completions() -> None:
    sample = replace(
        SAMPLE,
        # Step 1 of the first reveals two tokens of 0.9 and 0.2: 0.55 in the mean.
        unmask_step=torch.tensor([[1, 0, 1, 2], [0, 1, 3, 2], [0, 1, 2, NEVER]]).to(torch.int16),
        confidence=torch.tensor(
            [[0.9, 0.5, 0.2, 0.7], [0.1, 0.8, 0.3, 0.6], [0.4, 0.9, 0.2, math.nan]]
        ),
    )
    confidence = step_confidence(sample)
    expected = [[0.5, 0.55, 0.7, 0.0], [0.1, 0.8, 0.6, 0.3], [0.4, 0.9, 0.2, 0.0]]
    torch.testing.assert_close(confidence, torch.tensor(expected))
    limits = torch.tensor([3, 4, 3])
    for advantage, chosen in (
        (torch.tensor([0.5, 0.0, 1.0]), [[0, 1], [0, 3], [2, 0]]),
        (torch.tensor([-0.5, -0.1, -1.0]), [[2, 1], [1, 2], [1, 0]]),
    ):
        selected = select(sample, "sign_aware", 2, limits=limits, advantage=advantage)
        assert selected.tolist() == chosen
    with pytest.raises(ValueError, match="needs the advantages"):
        select(sample, "sign_aware", 2, limits=limits)
