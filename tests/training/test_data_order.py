"""The order of training examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egspo.training.data_order import data_order

SEEDS = st.one_of(st.integers(0, 10), st.integers(-(2**70), 2**70))


@given(SEEDS, st.integers(1, 40), st.integers(0, 5))
def test_every_epoch_is_a_permutation(seed: int, total: int, epoch: int) -> None:
    assert sorted(data_order(seed, total, epoch * total, total)) == list(range(total))


@given(
    st.integers(0, 10),
    st.integers(1, 12),
    st.integers(0, 50),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_windows_agree_with_one_long_window(
    seed: int, total: int, first: int, counts: list[int]
) -> None:
    windows, place = [], first
    for count in counts:
        windows += data_order(seed, total, place, count)
        place += count
    assert windows == data_order(seed, total, 0, place)[first:]


def test_epochs_and_seeds_differ() -> None:
    epochs = [tuple(data_order(seed, 50, e * 50, 50)) for seed in range(20) for e in range(20)]
    assert len(set(epochs)) == len(epochs)
    assert tuple(range(50)) not in epochs


def test_large_seeds_differ() -> None:
    seeds = [0, 1, 2**31, 2**32 - 1, 2**40 + 7, 2**63 + 5, -2]
    assert len({tuple(data_order(seed, 50, 0, 50)) for seed in seeds}) == len(seeds)


def test_first_place_is_close_to_uniform() -> None:
    counts = [0] * 4
    for epoch in range(4000):
        counts[data_order(7, 4, epoch * 4, 1)[0]] += 1
    # Standard deviation of each count: 27.
    assert all(abs(count - 1000) < 140 for count in counts)


@pytest.mark.parametrize("first", [0, 1, 9, 10, 11, 20])
def test_nothing_asked(first: int) -> None:
    assert data_order(0, 10, first, 0) == []


@pytest.mark.parametrize(
    ("total", "first", "count"), [(0, 0, 1), (-1, 0, 1), (3, -1, 1), (3, 0, -1)]
)
def test_bad_arguments(total: int, first: int, count: int) -> None:
    message = f"got total={total}, first={first}, count={count}"
    with pytest.raises(ValueError, match=message):
        data_order(0, total, first, count)
