"""Metrics of several processes are those of one that has all the values."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egspo.engines.reduction import Count, How, merge, part

values = st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), max_size=12)


@given(st.lists(values, min_size=1, max_size=4))
def test_parts_join_to_the_statistic_of_everything(shares: list[list[float]]) -> None:
    merged = merge(
        [
            {how: part(torch.tensor(share, dtype=torch.float64), how) for how in get_args(How)}
            for share in shares
        ]
    )
    every = torch.tensor([v for share in shares for v in share], dtype=torch.float64)
    every = every[~every.isnan()]
    if not every.numel():
        assert merged == dict.fromkeys(get_args(How))
        return
    expected = {
        "mean": every.mean(),
        "rms": every.square().mean().sqrt(),
        "std": every.std(correction=0),
        "max": every.max(),
    }
    for how, value in expected.items():
        assert merged[how] == pytest.approx(float(value), rel=1e-9, abs=1e-4), how


def test_the_rest_of_a_record() -> None:
    records = [
        {"n": Count(2), "histogram": [1, 0], "time/x": 1.0, "speed/x": 3.0, "lr": 0.1, "kl": None},
        {"n": Count(3), "histogram": [4, 5], "time/x": 2.0, "speed/x": 4.0, "lr": 0.1, "kl": None},
    ]
    assert merge(records) == {
        **{"n": 5, "histogram": [5, 5], "time/x": 2.0, "speed/x": 7.0, "lr": 0.1, "kl": None}
    }


def test_booleans_and_half_precision_are_averaged_in_full() -> None:
    assert merge([{"x": part(torch.tensor([True, False, False, False]))}]) == {"x": 0.25}
    many = torch.full((3000,), 1.001, dtype=torch.bfloat16)
    assert merge([{"x": part(many)}]) == {"x": float(many[0])}
