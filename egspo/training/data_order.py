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

    Raises:
        ValueError: if ``total`` is not positive, or ``first`` or ``count`` is negative.
    """
    if total < 1 or first < 0 or count < 0:
        raise ValueError(
            "total must be >= 1, first and count >= 0, "
            f"got total={total}, first={first}, count={count}"
        )
    orders = {
        epoch: torch.randperm(total, generator=_generator(seed, epoch)).tolist()
        for epoch in range(first // total, (first + count - 1) // total + 1)
    }
    return [orders[place // total][place % total] for place in range(first, first + count)]


def _generator(seed: int, epoch: int) -> torch.Generator:
    # Modulo, because torch refuses seeds of more than 64 bits (it uses the lowest 32).
    return torch.Generator().manual_seed((seed * _EPOCH_STRIDE + epoch) % 2**63)
