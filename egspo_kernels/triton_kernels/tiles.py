"""One pass over a segment of a row: what the threads of a program read, and what they keep.

A program has :data:`THREADS` threads and a segment of :data:`SEGMENT` columns. It reads tiles of
:data:`TILE` columns, of which a thread takes :data:`GROUP` neighbours: one load of 16 bytes of
bfloat16. A thread keeps its largest logit and its sums, in units of its own maximum, and meets the
others once, at the end of the segment.

On the way a weight is ``2^fma(x, scale, -reference)`` with ``scale = log2(e) / temperature`` and
``reference`` the thread's maximum times ``scale``, rounded: one instruction, without a rounding of
the product. Nothing there is guarded. A logit that is infinite, NaN or beyond 1e30 leaves sums
that are not finite, and the segment is read again by the exact path.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

THREADS = tl.constexpr(128)
GROUP = tl.constexpr(8)
TILE = tl.constexpr(1024)
SEGMENT = tl.constexpr(16384)
"""Reductions across threads cost a sixth of a pass over this many columns."""

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
NO_LOGIT = tl.constexpr(-1e30)
"""Stands for a logit that does not exist: finite, so that no product with it is NaN."""
FAR = tl.constexpr(16777216.0)
"""2^24: beyond it a float32 reference is no longer exact to one unit."""


@triton.jit
def row_pointer(logits, row, row_stride, ALIGN: tl.constexpr):
    """Pointer to the start of a row, whose stride is a multiple of ``ALIGN`` elements."""
    return logits + tl.multiple_of(row.to(tl.int64) * row_stride, ALIGN)


@triton.jit
def finite_or_zero(maximum):
    """A shift that leaves rows of -inf at -inf, where ``-inf - -inf`` would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def power_terms(exponent):
    """``2^d`` and ``2^d d``; both 0 for -inf, and NaN stays NaN.

    Powers of two are what the hardware has. At -200 they are 0 already, without ``-inf * 0``.
    """
    exponent = tl.maximum(exponent, -200.0, propagate_nan=tl.PropagateNan.ALL)
    weight = tl.exp2(exponent)
    return weight, weight * exponent


@triton.jit
def first_column(selected, columns):
    """The lowest of the selected columns, or the largest int32."""
    return tl.min(tl.where(selected, columns, 0x7FFFFFFF), 0)


@triton.jit
def load_four(pointers):
    """Four neighbours for each thread, in one access of 16 bytes."""
    loaded = tl.load(pointers[:, None] + tl.arange(0, 4)[None, :])
    even, odd = tl.split(tl.reshape(loaded, (THREADS, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def unpack(word, dtype: tl.constexpr):
    """Two half-precision logits of a word; bfloat16 becomes float32 by a shift."""
    if dtype == tl.bfloat16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def load_tile(start, first):
    """The ``GROUP`` columns of the threads of a whole tile, of a row that is aligned to 16 bytes.

    They are apart, float32 [THREADS] each: sums over them go in one order, however they came.
    """
    place = first + tl.arange(0, THREADS) * GROUP
    dtype: tl.constexpr = start.dtype.element_ty
    if dtype == tl.float32:
        x0, x1, x2, x3 = load_four(start + place)
        x4, x5, x6, x7 = load_four(start + place + 4)
    else:
        words = start.to(tl.pointer_type(tl.int32), bitcast=True)
        a, b, c, d = load_four(words + place // 2)
        x0, x1 = unpack(a, dtype)
        x2, x3 = unpack(b, dtype)
        x4, x5 = unpack(c, dtype)
        x6, x7 = unpack(d, dtype)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def load_column(start, columns, end, banned, ABSENT: tl.constexpr):
    """float32 logits, ``ABSENT`` where there is none."""
    exists = (columns < end) & (columns != banned)
    return tl.load(start + columns, mask=exists, other=ABSENT).to(tl.float32)


@triton.jit
def load_ragged(start, first, end, banned, ABSENT: tl.constexpr):
    """The same of a tile that is not whole or holds the banned token, or of an unaligned row."""
    c = first + tl.arange(0, THREADS) * GROUP
    x0 = load_column(start, c, end, banned, ABSENT)
    x1 = load_column(start, c + 1, end, banned, ABSENT)
    x2 = load_column(start, c + 2, end, banned, ABSENT)
    x3 = load_column(start, c + 3, end, banned, ABSENT)
    x4 = load_column(start, c + 4, end, banned, ABSENT)
    x5 = load_column(start, c + 5, end, banned, ABSENT)
    x6 = load_column(start, c + 6, end, banned, ABSENT)
    x7 = load_column(start, c + 7, end, banned, ABSENT)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def load_whole(start, first, end, ALIGNED: tl.constexpr):
    """The same of a whole tile without the banned token; 16 bytes at a time where rows allow it."""
    return load_tile(start, first) if ALIGNED else load_ragged(start, first, end, -1, NO_LOGIT)


@triton.jit
def segment_bounds(segment, width, banned):
    """First column, end of the pairs of whole tiles without the banned token, end; of a segment."""
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, width)
    stop = tl.where(banned >= begin, tl.minimum(end, banned), end)
    return begin, begin + tl.maximum(stop - begin, 0) // (2 * TILE) * (2 * TILE), end


@triton.jit
def largest_of(x):
    """The threads' largest of their columns."""
    largest = x[0]
    for i in tl.static_range(1, len(x)):
        largest = tl.maximum(largest, x[i])
    return largest


@triton.jit
def raise_maximum(x, first, maximum, place):
    """The threads' maxima with those of a tile, and the tile in which each was first met."""
    largest = largest_of(x)
    return tl.maximum(maximum, largest), tl.where(largest > maximum, first, place)


@triton.jit
def power_of_two(exponent):
    """``2^d`` without the special unit, and ``d``, at least -126; d is at most about 1.

    A polynomial of the fraction, exact to 1e-7, and the whole part added to its exponent.
    """
    exponent = tl.maximum(exponent, -126.0)
    whole = exponent + 12582912.0  # 1.5 * 2^23: its last bit is 1
    fraction = exponent - (whole - 12582912.0)
    power = tl.fma(fraction, 0.001326472731307149, 0.009671512991189957)
    power = tl.fma(power, fraction, 0.05550733581185341)
    power = tl.fma(power, fraction, 0.24022242426872253)
    power = tl.fma(power, fraction, 0.6931470036506653)
    power = tl.fma(power, fraction, 1.0)
    bits = (whole.to(tl.int32, bitcast=True) << 23) + power.to(tl.int32, bitcast=True)
    return bits.to(tl.float32, bitcast=True), exponent


@triton.jit
def accumulate(
    x, maximum, scale, reference, total, moment, MOMENT: tl.constexpr, SPARED: tl.constexpr = 1000
):
    """Reference, ``sum 2^d`` and ``sum 2^d d`` of the threads with those of a tile.

    Args:
        x: columns, [THREADS] each.
        maximum: [THREADS], of all logits up to here.
        reference, total, moment: [THREADS], of the logits before these.
        SPARED: one in so many powers is taken by others than the special unit.
    """
    # An addition, so that the compiler fuses the product with none of those that follow.
    new = tl.fma(maximum, scale, 0.0)
    shift = -new
    step = reference + shift
    ratio = tl.exp2(step)
    if MOMENT:
        moment = (moment + step * total) * ratio
    exponent = tl.fma(x[0], scale, shift)
    weight = tl.exp2(exponent)
    weights = weight
    terms = weight * exponent
    for i in tl.static_range(1, len(x)):
        exponent = tl.fma(x[i], scale, shift)
        if (SPARED - 1 - i) % SPARED == 0:
            weight, exponent = power_of_two(exponent)
        else:
            weight = tl.exp2(exponent)
        weights += weight
        terms = tl.fma(weight, exponent, terms)
    if MOMENT:
        moment += terms
    return new, total * ratio + weights, moment


@triton.jit
def accumulate_exactly(x, shift, scale, total, moment):
    """The same relative to the segment's maximum, for any logits."""
    for i in tl.static_range(len(x)):
        weight, term = power_terms((x[i] - shift) * scale)
        total += weight
        moment += term
    return total, moment


@triton.jit
def in_units_of(top, scale, reference, total, moment):
    """Sums relative to ``top`` of sums relative to the threads' references."""
    step = tl.fma(top, -scale, reference)
    ratio = tl.exp2(step)
    return total * ratio, (moment + step * total) * ratio


@triton.jit
def strange(top, scale, sums):
    """Whether a segment needs the exact path."""
    return ~((tl.abs(sums) < float("inf")) & (tl.abs(top) * scale < FAR))


@triton.jit
def exact_maximum(start, begin, end, banned):
    """Largest logit of a segment, -inf where there is none."""
    maximum = tl.full((THREADS,), float("-inf"), tl.float32)
    for first in tl.range(begin, end, TILE):
        x = load_ragged(start, first, end, banned, float("-inf"))
        maximum = tl.maximum(maximum, largest_of(x))
    return tl.max(maximum, 0)


@triton.jit
def lowest_column(x, top, first, lowest):
    """The threads' lowest columns with the logit ``top``, with those of a tile."""
    columns = first + tl.arange(0, THREADS) * GROUP
    for i in tl.static_range(len(x)):
        lowest = tl.minimum(lowest, tl.where(x[i] == top, columns + i, 0x7FFFFFFF))
    return lowest


@triton.jit
def largest_column(start, top, maximum, place, end, banned):
    """First column with the logit ``top``, from where the threads met their maxima."""
    group = first_column(maximum == top, place + tl.arange(0, THREADS) * GROUP)
    columns = group + tl.arange(0, GROUP)
    return first_column(load_column(start, columns, end, banned, NO_LOGIT) == top, columns)
