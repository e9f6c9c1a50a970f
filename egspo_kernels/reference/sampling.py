"""Sampling in two levels: a block of columns, then a token of that block.

With independent standard exponentials ``E``, ``argmax_i w_i / E_i`` is ``i`` with probability
``w_i / sum(w)`` (Gumbel-max without its logarithms). The first race is between the sums of the
weights of blocks, the second between the weights inside the winner: a row costs a number for each
block and one for each column of a block, not one for each logit, and its distribution is the
softmax all the same.

A row is cut into segments of ``SEGMENT`` columns, and a segment into ``BLOCKS`` blocks of at most
``COLUMNS`` columns: groups of ``GROUP`` neighbours, ``TILE`` columns apart. That is what a thread
of a GPU reads, so that it holds the sum of a block already.

A number is a function of (seed, step, row id) and of its column or block, see
:mod:`egspo_kernels.random`. It has 32 bits, from the middles of their cells: with ``p`` the
probability of a block, or of a token given its block, the share drawn is
``p * (d / 2) / sinh(d / 2)`` with ``d = 2**-32 / p``, which is 0.2 % short at 1e-9 and 20 % at
1e-10; nothing below 6e-12 is ever drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egspo_kernels.random import BLOCK_COUNTERS, group_exponential

SEGMENT, TILE, GROUP = 16384, 1024, 8
"""Constants, so that a row's sample depends on nothing but the row."""
BLOCKS = TILE // GROUP
COLUMNS = SEGMENT // BLOCKS


def draw(weights: Tensor, seed: int, step: int, row_ids: Tensor) -> Tensor:
    """int64 [N]: a column of each row, with probability proportional to its weight.

    Args:
        weights: float32 or float64 [N, V], not negative, the largest of each row about 1.
        seed, step, row_ids: as :func:`egspo_kernels.sample_tokens`.
    """
    rows, vocab_size = weights.shape
    segments = -(-vocab_size // SEGMENT)
    padded = torch.nn.functional.pad(weights, (0, segments * SEGMENT - vocab_size))
    cut = padded.view(rows, segments, SEGMENT // TILE, BLOCKS, GROUP)
    counters = torch.arange(segments * BLOCKS // 4, device=weights.device) + BLOCK_COUNTERS
    noise = group_exponential(seed, step, row_ids, counters[None, :])
    block = (cut.sum((2, 4)).flatten(1) / noise).argmax(-1)
    columns = block_columns(block)
    inside = padded.gather(1, columns)
    noise = group_exponential(seed, step, row_ids, columns[:, ::4] // 4)
    return columns.gather(1, (inside / noise).argmax(-1, keepdim=True)).squeeze(1)


def block_columns(block: Tensor) -> Tensor:
    """int64 [N, COLUMNS]: the columns of a block of each row, ascending, the last beyond V."""
    inside = torch.arange(COLUMNS, device=block.device)
    first = block // BLOCKS * SEGMENT + block % BLOCKS * GROUP
    return first[:, None] + inside // GROUP * TILE + inside % GROUP
