"""Advantages against their formulas, with padding and skipped rewards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from egspo.algorithm.advantages import (
    egspo_advantages,
    egspo_sa_advantages,
    groups_with_spread,
    lambda_at,
)
from egspo.config import AlgorithmConfig

NAN = math.nan
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.2, 0.2]], dtype=torch.float64)
VALUES = torch.tensor(
    [[[0.5, 1.0], [0.0, 0.25], [0.5, NAN]], [[0.1, 0.2], [0.3, 0.2], [0.2, 0.2]]],
    dtype=torch.float64,
)
VALID = ~VALUES.isnan()
LAM = torch.tensor(0.5, dtype=torch.float64)


def test_egspo() -> None:
    advantage = egspo_advantages(REWARDS, torch.ones(2, 3, 2, dtype=torch.bool))
    assert advantage[0].tolist() == [[0.5, 0.5], [-0.5, -0.5], [0.0, 0.0]]
    assert advantage[1].abs().max() < 1e-9


@pytest.mark.parametrize("normalize", [True, False])
def test_rank_baseline_averages_over_those_present(normalize: bool) -> None:
    result = egspo_sa_advantages(
        REWARDS, VALUES, VALID, LAM, normalize_returns=normalize, baseline="rank"
    )
    # G_ik = R + 0.5 (R - V)
    returns = [[1.25, 1.0], [0.0, -0.125], [0.5, NAN]]
    rank0 = (1.25 + 0.0 + 0.5) / 3
    rank1 = (1.0 - 0.125) / 2
    expected = torch.tensor(
        [
            [returns[0][0] - rank0, returns[0][1] - rank1],
            [returns[1][0] - rank0, returns[1][1] - rank1],
            [returns[2][0] - rank0, 0.0],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(result[0], expected / (1.5 if normalize else 1.0))


def test_group_baseline() -> None:
    result = egspo_sa_advantages(REWARDS, VALUES, VALID, LAM, baseline="group")
    others = (0.0 - 0.125) / 2 + 0.5
    assert result[0, 0, 0].item() == pytest.approx((1.25 - (1.25 + others) / 3) / 1.5)
    assert result[0, 0, 1].item() == pytest.approx((1.0 - (1.0 + others) / 3) / 1.5)
    assert result[0, 2, 1] == 0


def test_a_member_without_selected_steps_counts_with_its_reward() -> None:
    rewards = torch.tensor([[1.0, 0.0, NAN]], dtype=torch.float64)
    values = torch.tensor([[[0.5, 1.0], [NAN, NAN], [0.2, 0.2]]], dtype=torch.float64)
    result = egspo_sa_advantages(rewards, values, ~values.isnan(), LAM, normalize_returns=False)
    assert result[0].tolist() == [[1.25 - 1.25 / 2, 1.0 - 1.0 / 2], [0.0, 0.0], [0.0, 0.0]]
    valid = torch.tensor([[[True, True], [True, False], [False, False]]])
    egspo = egspo_advantages(rewards, valid)
    assert egspo[0].tolist() == [[0.5, 0.5], [-0.5, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("baseline", ["group", "rank"])
def test_equal_returns_give_exactly_nothing(baseline: Any) -> None:
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    values = torch.full((1, 3, 3), 0.7, dtype=torch.float64)
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    result = egspo_sa_advantages(rewards, values, valid, LAM, baseline=baseline)
    assert not result.any() and not egspo_advantages(rewards, valid).any()


def test_split_returns() -> None:
    result = egspo_sa_advantages(
        REWARDS, VALUES, VALID, LAM, returns="split", normalize_returns=False
    )
    assert result[0, 0, 0].item() == pytest.approx((1 - 0.5) + 0.5 * (1 - 0.5))
    assert result[0, 2, 1] == 0


def test_step_rewards_replace_the_reward_in_the_step_term() -> None:
    result = egspo_sa_advantages(
        REWARDS,
        VALUES,
        VALID,
        LAM,
        step_rewards=REWARDS - 0.1,
        returns="split",
        normalize_returns=False,
    )
    assert result[0, 0, 0].item() == pytest.approx(0.5 + 0.5 * (0.9 - 0.5))


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_skipped_sample_neither_counts_nor_learns(stepwise: bool) -> None:
    rewards = torch.tensor([[1.0, NAN, 0.0]], dtype=torch.float64)
    valid = torch.ones(1, 3, 2, dtype=torch.bool)
    if stepwise:
        values = torch.zeros(1, 3, 2, dtype=torch.float64)
        result = egspo_sa_advantages(rewards, values, valid, torch.zeros(()))
    else:
        result = egspo_advantages(rewards, valid)
    assert result[0].tolist() == [[0.5, 0.5], [0.0, 0.0], [-0.5, -0.5]]


def test_scale_by_std() -> None:
    valid = torch.ones(2, 3, 2, dtype=torch.bool)
    result = egspo_advantages(REWARDS, valid, scale_by_std=True)
    assert result[0, 0, 0].item() == pytest.approx(1.0, rel=1e-5)
    assert result[1].abs().max() < 1e-9


def test_lambda_schedules() -> None:
    steps = torch.tensor([[0, 5, 10]])
    constant = AlgorithmConfig(lam=0.5)
    assert lambda_at(constant, 7, steps, 11).tolist() == [[0.5, 0.5, 0.5]]
    late = AlgorithmConfig(lam=0.5, lam_schedule="late")
    assert lambda_at(late, 7, steps, 11).tolist() == [[0.0, 0.25, 0.5]]
    halving = AlgorithmConfig(lam=0.5, lam_schedule="halving", lam_halving_updates=10)
    assert [lambda_at(halving, u, steps, 11)[0, 0].item() for u in (0, 9, 10, 20)] == [
        0.5,
        0.5,
        0.25,
        0.125,
    ]


def test_groups_with_spread() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.3, 0.3], [NAN, 0.5], [NAN, NAN]])
    assert groups_with_spread(rewards).tolist() == [True, False, False, False]
