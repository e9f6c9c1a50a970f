"""The counter-based noise of :mod:`egspo_kernels.random` as device functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(high, low):
    """A uniform number in (0, 1) of two uint32: near 0 it is a multiple of 2^-64."""
    u = (high.to(tl.float32) + (low.to(tl.float32) + 0.5) * 2.0**-32) * 2.0**-32
    return tl.minimum(u, 1.0 - 2.0**-24)


@triton.jit
def exponential(u):
    """Standard exponential ``-log1p(-u)``, whose logarithm is a negative Gumbel number.

    ``u - (1 - w)`` restores what rounding ``w = 1 - u`` lost: the sample is decided by the
    smallest values.
    """
    w = 1.0 - u
    return (u - (1.0 - w)) - tl.log(w)


@triton.jit
def exponentials(seed, step, row_id, index):
    """The exponentials of some indices, float32, one of each counter.

    Args:
        seed, step, row_id: int64, of which the low 64, 32 and 64 bits count.
        index: int32, read as 32 bits.
    """
    zero = index * 0
    high, low, _, _ = tl.philox(
        seed,
        index,
        zero + row_id.to(tl.int32),
        zero + (row_id >> 32).to(tl.int32),
        zero + step.to(tl.int32),
    )
    return exponential(uniform(high, low))
