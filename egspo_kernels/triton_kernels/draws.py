"""The two draws of a sample: a thread's columns of a segment, then a token of these.

:mod:`egspo_kernels.reference.sampling` is the definition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from egspo_kernels.triton_kernels.noise import exponentials, exponentials_of_four
from egspo_kernels.triton_kernels.tiles import (
    GROUP,
    SEGMENT,
    THREADS,
    TILE,
    finite_or_zero,
    first_column,
    load_column,
    power_terms,
)

COLUMNS = tl.constexpr(SEGMENT.value // THREADS.value)
"""Of a thread, in a segment."""


@triton.jit
def add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def meet(a, b, c, d, score, lane, e, f, g, h, other, other_lane):
    """Sums of two groups of threads, and the better score with its thread."""
    wins = other > score
    best, winner = tl.where(wins, other, score), tl.where(wins, other_lane, lane)
    return a + e, b + f, c + g, d + h, best, winner


@triton.jit
def exchange(total, own, entropy_total, moment, noise, SAMPLING: tl.constexpr):
    """The sums over threads; the score of the sample, and its thread. All exchanged at once."""
    if SAMPLING == "greedy":
        a, b, c, d = tl.reduce((total, own, entropy_total, moment), 0, add_four)
        return a, b, c, d, 0.0, 0
    else:
        operands = (total, own, entropy_total, moment, own / noise, tl.arange(0, THREADS))
        return tl.reduce(operands, 0, meet)


@triton.jit
def block_noise(segment, seed, step, row_id):
    """float32 [THREADS]: the exponentials of the threads' columns of a segment."""
    block = segment * THREADS + tl.arange(0, THREADS)
    # The counters of blocks start at 2^31: the sign of an int32.
    return exponentials(seed, step, row_id, (block // 4) | -0x80000000, block % 4)


@triton.jit
def draw_token(start, segment, lane, banned, top, scale, seed, step, row_id, VOCAB: tl.constexpr):
    """The token drawn among the columns of a thread of a segment, and its logit.

    Args:
        top: the segment's maximum, to which the masses were relative.
    """
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, VOCAB)
    # Each of 32 threads takes four neighbours: one counter.
    threads = tl.arange(0, COLUMNS // 4)
    columns = begin + threads // (GROUP // 4) * TILE + lane * GROUP + threads % (GROUP // 4) * 4
    noise = exponentials_of_four(seed, step, row_id, columns // 4)
    best = tl.full((COLUMNS // 4,), -1.0, tl.float32)
    token = tl.full((COLUMNS // 4,), 0x7FFFFFFF, tl.int32)
    logit = tl.full((COLUMNS // 4,), float("-inf"), tl.float32)
    for i in tl.static_range(4):
        x = load_column(start, columns + i, end, banned, float("-inf"))
        weight, _ = power_terms((x - finite_or_zero(top)) * scale)
        race = weight / noise[i]
        wins = race > best
        best, logit = tl.where(wins, race, best), tl.where(wins, x, logit)
        token = tl.where(wins, columns + i, token)
    # Without a winner, in a segment of NaN, what is sampled must still be a token.
    drawn = tl.minimum(first_column(best == tl.max(best, 0), token), VOCAB - 1)
    return drawn, tl.max(tl.where(token == drawn, logit, float("-inf")), 0)
