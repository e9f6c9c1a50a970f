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
def words(seed, step, row_id, counter):
    """Four uint32 of each counter, Philox 4x32-10; arguments as :func:`exponentials`.

    The products are whole ones of 64 bits: one instruction, where halves of them are two.
    """
    a, b = counter.to(tl.uint32), (counter * 0 + row_id.to(tl.int32)).to(tl.uint32)
    c = (counter * 0 + (row_id >> 32).to(tl.int32)).to(tl.uint32)
    d = (counter * 0 + step.to(tl.int32)).to(tl.uint32)
    seed = seed.to(tl.uint64)  # the interpreter chooses a type by the value
    key, next_key = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        left, right = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, c = (right >> 32).to(tl.uint32) ^ b ^ key, (left >> 32).to(tl.uint32) ^ d ^ next_key
        b, d = right.to(tl.uint32), left.to(tl.uint32)
        key, next_key = key + 0x9E3779B9, next_key + 0xBB67AE85
    return a, b, c, d


@triton.jit
def exponentials(seed, step, row_id, counter, word):
    """float32 exponentials, one from a word (0 to 3) of each counter.

    Args:
        seed, step, row_id: int64, of which the low 64, 32 and 64 bits count.
        counter: int32, read as 32 bits.
    """
    a, b, c, d = words(seed, step, row_id, counter)
    low, high = tl.where(word == 0, a, b), tl.where(word == 2, c, d)
    return exponential(uniform(tl.where(word < 2, low, high)))


@triton.jit
def exponentials_of_four(seed, step, row_id, counter):
    """The exponentials of the four words of each counter."""
    a, b, c, d = words(seed, step, row_id, counter)
    return (
        exponential(uniform(a)),
        exponential(uniform(b)),
        exponential(uniform(c)),
        exponential(uniform(d)),
    )
