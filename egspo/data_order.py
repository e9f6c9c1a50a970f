"""Which training examples come when: a pure function of the seed and the place in the run."""

from __future__ import annotations

import torch

_EPOCH_STRIDE = 1_000_003


def data_order(seed: int, total: int, first: int, count: int) -> list[int]:
    """Examples number ``first`` to ``first + count`` of a run: a fresh permutation every epoch.

    Args:
        seed: of the permutations.
        total: examples in the data set, > 0.
        first: examples already used.
        count: examples wanted; may reach over the end of an epoch.
    """
    orders = {
        epoch: torch.randperm(
            total, generator=torch.Generator().manual_seed(seed * _EPOCH_STRIDE + epoch)
        ).tolist()
        for epoch in range(first // total, (first + count - 1) // total + 1)
    }
    return [orders[place // total][place % total] for place in range(first, first + count)]
