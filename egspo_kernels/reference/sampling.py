"""Sampling in two levels: a block of columns, then a token of that block.

With independent standard exponentials ``E``, ``argmax_i w_i / E_i`` is ``i`` with probability
``w_i / sum(w)`` (Gumbel-max without its logarithms). The first race is between the sums of the
weights of blocks of ``SAMPLING_BLOCK`` columns, the second between the weights inside the winner: a
row costs a number for each block and ``SAMPLING_BLOCK`` more, not one for each logit, and its
distribution is the softmax all the same.

A number is a function of (seed, step, row id) and of its column or block, see
:mod:`egspo_kernels.random`. It has 32 bits, from the middles of their cells: with ``p`` the
probability of a block, or of a token given its block, the share drawn is
``p * (d / 2) / sinh(d / 2)`` with ``d = 2**-32 / p``, which is 0.2 % short at 1e-9 and 20 % at
1e-10; nothing below 6e-12 is ever drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egspo_kernels.random import BLOCK_COUNTERS, counter_exponential

SAMPLING_BLOCK = 1024
"""Columns of a block; a constant, so that a row's sample depends on nothing but the row."""


def draw(weights: Tensor, seed: int, step: int, row_ids: Tensor) -> Tensor:
    """int64 [N]: a column of each row, with probability proportional to its weight.

    Args:
        weights: float32 or float64 [N, V], not negative, the largest of each row about 1.
        seed, step, row_ids: as :func:`egspo_kernels.sample_tokens`.
    """
    rows, vocab_size = weights.shape
    block_size = min(SAMPLING_BLOCK, vocab_size)
    blocks = -(-vocab_size // block_size)
    if blocks == 1:
        return (weights / counter_exponential(seed, step, row_ids, vocab_size)).argmax(-1)
    padded = torch.nn.functional.pad(weights, (0, blocks * block_size - vocab_size))
    cut = padded.view(rows, blocks, block_size)
    noise = counter_exponential(seed, step, row_ids, blocks, BLOCK_COUNTERS)
    block = (cut.sum(-1) / noise).argmax(-1)
    inside = cut.gather(1, block[:, None, None].expand(-1, 1, block_size)).squeeze(1)
    noise = counter_exponential(seed, step, row_ids, block_size, block * (block_size // 4))
    return block * block_size + (inside / noise).argmax(-1)
