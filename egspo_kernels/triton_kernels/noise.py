"""The counter-based noise of :mod:`egspo_kernels.random` as device functions: the same counters,
the same uniform numbers to the last bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(word):
    """``(word + 0.5) / 2**32`` of a uint32, rounded once: its halves are exact."""
    high = (word >> 16).to(tl.float32) * 65536.0
    low = (word & 0xFFFF).to(tl.float32) + 0.5
    return tl.minimum((high + low) * 2.3283064365386963e-10, 1.0 - 2.0**-24)


@triton.jit
def exponential(u):
    """Standard exponential ``-log1p(-u)``, whose logarithm is a negative Gumbel number.

    ``u - (1 - w)`` restores what rounding ``w = 1 - u`` lost: the sample is decided by the
    smallest values.
    """
    w = 1.0 - u
    return (u - (1.0 - w)) - tl.log(w)


@triton.jit
def exponentials(seed, step, row_id, counter, word):
    """float32 exponentials, one from a word (0 to 3) of each counter.

    Args:
        seed, step, row_id: int64, of which the low 64, 32 and 64 bits count.
        counter: int32, read as 32 bits.
    """
    zero = counter * 0
    a, b, c, d = tl.philox(
        seed,
        counter,
        zero + row_id.to(tl.int32),
        zero + (row_id >> 32).to(tl.int32),
        zero + step.to(tl.int32),
    )
    low, high = tl.where(word == 0, a, b), tl.where(word == 2, c, d)
    return exponential(uniform(tl.where(word < 2, low, high)))
