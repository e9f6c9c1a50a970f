"""Counter-based noise: the published test vectors, the distribution, independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from egspo_kernels import counter_gumbel, counter_uniform
from egspo_kernels.random import philox

# Known answers of Random123's philox4x32-10: counter, key, output.
VECTORS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox(key[0] | key[1] << 32, *(torch.tensor([c]) for c in counter))
    assert words[0].tolist() == expected


def test_uniform_is_uniform_and_open() -> None:
    values = counter_uniform(7, 3, torch.arange(400), 1000).flatten()
    assert float(values.min()) > 0 and float(values.max()) < 1
    counts = torch.histc(values, bins=100, min=0, max=1)
    statistic = float(((counts - 4000) ** 2 / 4000).sum())
    assert statistic < 99 + 5 * math.sqrt(2 * 99)


def test_gumbel_moments() -> None:
    values = counter_gumbel(1, 0, torch.arange(400), 1000).double()
    assert float(values.mean()) == pytest.approx(0.57721566, abs=0.01)
    assert float(values.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert bool(values.isfinite().all())


def test_a_row_depends_on_its_key_alone() -> None:
    ids = torch.tensor([5, 2**40 + 5, 9])
    rows = counter_uniform(7, 3, ids, 10)
    for i in range(3):
        assert torch.equal(counter_uniform(7, 3, ids[i : i + 1], 10)[0], rows[i])
        # The columns asked for do not change those before.
        assert torch.equal(counter_uniform(7, 3, ids[i : i + 1], 7)[0], rows[i, :7])
    others = [
        counter_uniform(8, 3, ids, 10),
        counter_uniform(7 + 2**32, 3, ids, 10),
        counter_uniform(7, 4, ids, 10),
        rows[[1, 2, 0]],
    ]
    assert all(not bool((other == rows).any()) for other in others)


@pytest.mark.parametrize(
    ("step", "ids"),
    [(-1, torch.arange(2)), (0, torch.arange(2).int()), (0, torch.zeros(1, 1).long())],
)
def test_bad_keys_are_refused(step: int, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"step|row_ids"):
        counter_uniform(0, step, ids, 4)
