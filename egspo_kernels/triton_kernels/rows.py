"""Softmax statistics of rows of logits in one pass.

A segment of a row is summarised by its largest logit ``m`` and, in units of the temperature,
``s = sum e^(x-m)`` and ``t = sum e^(x-m) (x-m)``: the entropy is then ``log s - t/s``, a sum of
terms of one sign, where the unshifted form cancels. Logits that do not exist (beyond the
vocabulary, or banned) are -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from egspo_kernels.triton_kernels.launch import (
    Launcher,
    contiguous,
    dependent_launches,
    dtype_of,
    layout,
    on_device_of,
    prepare_logits,
    row_options,
    segment_count,
    segment_options,
)
from egspo_kernels.triton_kernels.tiles import (
    LN_2,
    LOG2_E,
    NO_LOGIT,
    SEGMENT,
    THREADS,
    TILE,
    accumulate,
    accumulate_exactly,
    exact_maximum,
    finite_or_zero,
    first_column,
    in_units_of,
    largest_column,
    load_ragged,
    load_whole,
    lowest_column,
    raise_maximum,
    row_pointer,
    segment_bounds,
    strange,
)
from egspo_kernels.types import TokenStats

REGISTERS = {2: 40, 4: 48}
"""Of a thread, by the bytes of a logit: twelve programs on a processor, or ten."""


@triton.jit
def locate_row(rows, n, row_count, VOCAB: tl.constexpr):
    """Row of output ``n`` and how many columns may be read: none, if it is out of range."""
    row = n.to(tl.int64) if rows is None else tl.load(rows + n).to(tl.int64)
    return row, tl.where((row >= 0) & (row < row_count), VOCAB, 0)


@triton.jit
def row_partials(partials, n, VOCAB: tl.constexpr):
    """The segments of row ``n``: their numbers, which exist, and where each left its first partial.

    The next partials are ``programs`` further, each.
    """
    segments: tl.constexpr = triton.cdiv(VOCAB, SEGMENT)
    segment = tl.arange(0, triton.next_power_of_2(segments))
    return segment, segment < segments, partials + n.to(tl.int64) * segments + segment


@triton.jit
def merge_segments(maxima, sums, moments, inverse_temperature):
    """``m``, ``s`` and ``t`` of a row from those of its segments.

    Args:
        maxima, sums, moments: float32 [segments]; one that does not exist is (-inf, 0, 0).
    """
    maximum = tl.max(maxima, 0)
    shift = (maxima - finite_or_zero(maximum)) * inverse_temperature
    scale = tl.exp(shift)
    moved = tl.where(shift > float("-inf"), scale * (moments + shift * sums), 0.0)
    return maximum, tl.sum(scale * sums, 0), tl.sum(moved, 0)


@triton.jit
def entropy_of(log_total, total, moment):
    """Of a row that is all but certain, rounding would give a number below 0. NaN stays NaN."""
    return tl.maximum(log_total - moment / total, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exact_statistics(start, begin, end, banned, scale):
    """(m, s, t, column) of a segment with logits of any kind."""
    top = exact_maximum(start, begin, end, banned)
    shift = finite_or_zero(top)
    total = tl.zeros((THREADS,), tl.float32)
    moment = tl.zeros((THREADS,), tl.float32)
    column = tl.full((THREADS,), 0x7FFFFFFF, tl.int32)
    for first in tl.range(begin, end, TILE):
        x = load_ragged(start, first, end, banned, float("-inf"))
        column = lowest_column(x, top, first, column)
        total, moment = accumulate_exactly(x, shift, scale, total, moment)
    return top, tl.sum(total, 0), tl.sum(moment, 0), tl.min(column, 0)


@triton.jit(
    do_not_specialize=["row_count", "row_stride", "banned", "programs"],
    do_not_specialize_on_alignment=["rows"],
)
def segment_statistics_kernel(
    logits,
    rows,
    partials,
    row_count: tl.int64,
    row_stride: tl.int64,
    programs: tl.int64,
    inverse_temperature,
    banned: tl.int32,
    VOCAB: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """(m, s, t, first column of m) of one segment of one row, to float32 [4, N * segments]."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    segments: tl.constexpr = triton.cdiv(VOCAB, SEGMENT)
    row, width = locate_row(rows, program // segments, row_count, VOCAB)
    start = row_pointer(logits, row, row_stride, ALIGN)
    begin, pairs_end, end = segment_bounds(program % segments, width, banned)
    scale = inverse_temperature * LOG2_E
    maximum = tl.full((THREADS,), NO_LOGIT, tl.float32)
    place = tl.zeros((THREADS,), tl.int32)
    reference = tl.fma(maximum, scale, 0.0)
    total = tl.zeros((THREADS,), tl.float32)
    moment = tl.zeros((THREADS,), tl.float32)
    for first in tl.range(begin, pairs_end, 2 * TILE):
        left = load_whole(start, first, end, ALIGNED)
        right = load_whole(start, first + TILE, end, ALIGNED)
        maximum, place = raise_maximum(left, first, maximum, place)
        maximum, place = raise_maximum(right, first + TILE, maximum, place)
        both = left + right
        reference, total, moment = accumulate(both, maximum, scale, reference, total, moment, True)
    for first in tl.range(pairs_end, end, TILE):
        x = load_ragged(start, first, end, banned, NO_LOGIT)
        maximum, place = raise_maximum(x, first, maximum, place)
        reference, total, moment = accumulate(x, maximum, scale, reference, total, moment, True)

    top = tl.max(maximum, 0)
    column = largest_column(start, top, maximum, place, end, banned)
    total, moment = in_units_of(top, scale, reference, total, moment)
    total_sum, moment_sum = tl.sum(total, 0), tl.sum(moment, 0)
    if strange(top, scale, total_sum + moment_sum):
        top, total_sum, moment_sum, column = exact_statistics(start, begin, end, banned, scale)
    tl.store(partials + program, top)
    tl.store(partials + programs + program, total_sum)
    tl.store(partials + 2 * programs + program, moment_sum * LN_2)
    tl.store(partials + 3 * programs + program, column.to(tl.float32, bitcast=True))


@triton.jit(
    do_not_specialize=["row_count", "row_stride", "banned", "programs"],
    do_not_specialize_on_alignment=["logits", "rows", "targets"],
)
def row_statistics_kernel(
    logits,
    rows,
    targets,
    partials,
    logsumexp_out,
    entropy_out,
    log_prob_out,
    argmax_out,
    confidence_out,
    row_count: tl.int64,
    row_stride: tl.int64,
    programs: tl.int64,
    inverse_temperature,
    banned: tl.int32,
    VOCAB: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Combines the segments of one row and writes its statistics."""
    n = tl.program_id(0)
    if targets is not None:
        row, width = locate_row(rows, n, row_count, VOCAB)
        target = tl.load(targets + n).to(tl.int64)
        valid = (target >= 0) & (target < width)
        offset = row * row_stride + target
        x = tl.load(logits + offset, mask=valid, other=float("nan")).to(tl.float32)
        x = tl.where(valid & (target == banned), float("-inf"), x)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    _, inside, source = row_partials(partials, n, VOCAB)
    maxima = tl.load(source, mask=inside, other=float("-inf"))
    sums = tl.load(source + programs, mask=inside, other=0.0)
    moments = tl.load(source + 2 * programs, mask=inside, other=0.0)
    columns = tl.load(source + 3 * programs, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    maximum, total, moment = merge_segments(maxima, sums, moments, inverse_temperature)
    # A row of NaN has no largest logit: what is found must still be a column.
    argmax = tl.minimum(first_column(inside & (maxima == maximum), columns), VOCAB - 1)
    log_total = tl.log(total)
    tl.store(logsumexp_out + n, maximum * inverse_temperature + log_total)
    tl.store(entropy_out + n, entropy_of(log_total, total, moment))
    tl.store(confidence_out + n, tl.where(total == 0, float("nan"), 1.0 / total))
    tl.store(argmax_out + n, argmax.to(tl.int64))
    if targets is not None:
        tl.store(log_prob_out + n, (x - maximum) * inverse_temperature - log_total)


_SEGMENTS = Launcher(segment_statistics_kernel)
_ROWS = Launcher(row_statistics_kernel)


def segment_statistics(
    logits: Tensor, rows: Tensor | None, temperature: float, banned_token: int | None, count: int
) -> Tensor:
    """Launcher: float32 [4 * count * segments], what the segments of the rows leave behind.

    Args:
        logits: with consecutive columns, on the current device.
        rows: [count], or None for all.
    """
    device, vocab_size = logits.get_device(), logits.shape[1]
    programs, form = count * segment_count(vocab_size), layout(logits)
    partials = logits.new_empty(4 * programs, dtype=torch.float32)
    arguments = (
        logits,
        rows,
        partials,
        logits.shape[0],
        logits.stride(0),
        programs,
        1.0 / temperature,
        -1 if banned_token is None else banned_token,
        vocab_size,
        form.align,
        form.aligned,
        dependent_launches(device),
    )
    variant = (device, vocab_size, dtype_of(rows), form)
    registers = REGISTERS[logits.element_size()]
    _SEGMENTS(programs, variant, arguments, segment_options(device, registers))
    return partials


def token_stats(
    logits: Tensor,
    targets: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    banned_token: int | None,
) -> TokenStats:
    """Launcher; arguments and results as :func:`egspo_kernels.token_stats`.

    A row index or a target out of range, unchecked on a GPU, gives NaN.
    """
    logits, rows = prepare_logits(logits, rows)
    count = logits.shape[0] if rows is None else rows.numel()
    logsumexp = logits.new_empty(count, dtype=torch.float32)
    entropy, confidence = torch.empty_like(logsumexp), torch.empty_like(logsumexp)
    log_prob = None if targets is None else torch.empty_like(logsumexp)
    argmax = logits.new_empty(count, dtype=torch.int64)
    stats = TokenStats(logsumexp, entropy, log_prob, argmax, confidence)
    if count == 0:
        return stats
    device, vocab_size = logits.get_device(), logits.shape[1]
    with on_device_of(logits):
        partials = segment_statistics(logits, rows, temperature, banned_token, count)
        arguments = (
            logits,
            rows,
            contiguous(targets),
            partials,
            *stats,
            logits.shape[0],
            logits.stride(0),
            count * segment_count(vocab_size),
            1.0 / temperature,
            -1 if banned_token is None else banned_token,
            vocab_size,
            dependent_launches(device),
        )
        variant = (device, vocab_size, logits.dtype, dtype_of(rows), dtype_of(targets))
        _ROWS(count, variant, arguments, row_options(device))
    return stats
