"""Exact KL divergence over the vocabulary: policy and reference rows are each read once.

With x the policy's logits and y the reference's, each less its largest and divided by the
temperature, ``KL = E_p[x - y] - log(sum e^x / sum e^y)``. Both terms are as small as the policies
are close, where the difference of two log-softmaxes would cancel. For the same reason differences
are taken of the logits themselves, less one number of the row: its first difference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egspo_kernels.triton_kernels.launch import (
    Launcher,
    dependent_launches,
    layout,
    on_device_of,
    prepare_logits,
    row_options,
    segment_count,
    segment_options,
)
from egspo_kernels.triton_kernels.normaliser import Normaliser, target_logit
from egspo_kernels.triton_kernels.rows import merge_segments, row_partials
from egspo_kernels.triton_kernels.tiles import (
    GROUP,
    LOG2_E,
    NO_LOGIT,
    SEGMENT,
    THREADS,
    TILE,
    exact_maximum,
    finite_or_zero,
    largest_of,
    load_column,
    load_ragged,
    load_whole,
    power_terms,
    row_pointer,
    segment_bounds,
    strange,
)

REGISTERS = 48
"""Of a thread: ten programs on a processor."""
PARTIALS = 5
"""float32 numbers that a segment leaves behind."""


class Divergence(NamedTuple):
    """What the gradient of the KL needs beside the policy's normaliser; float32 [N] each."""

    ref_maximum: Tensor
    """Largest reference logit."""
    mean_difference: Tensor
    """``E_p[x - y]``, x and y as above."""


@triton.jit
def accumulate_pair(x, y, offset, scale, maxima, references, sums):
    """Maxima, references and the sums of both rows with those of a tile.

    ``sums`` are ``sum p``, ``sum q`` and ``sum p ((x - offset) - y)``, p and q relative to the
    threads' references; the arguments as in :func:`accumulate`.
    """
    maximum = tl.maximum(maxima[0], largest_of(x))
    ref_maximum = tl.maximum(maxima[1], largest_of(y))
    new, ref_new = tl.fma(maximum, scale, 0.0), tl.fma(ref_maximum, scale, 0.0)
    ratio, ref_ratio = tl.exp2(references[0] - new), tl.exp2(references[1] - ref_new)
    total, ref_total, difference = sums[0] * ratio, sums[1] * ref_ratio, sums[2] * ratio
    for i in tl.static_range(len(x)):
        weight = tl.exp2(tl.fma(x[i], scale, -new))
        total += weight
        ref_total += tl.exp2(tl.fma(y[i], scale, -ref_new))
        difference = tl.fma(weight, (x[i] - offset) - y[i], difference)
    return (maximum, ref_maximum), (new, ref_new), (total, ref_total, difference)


@triton.jit
def exact_pair(start, ref_start, begin, end, banned, scale, shift, ref_shift):
    """``sum p``, ``sum q`` and ``sum p (x - y)`` of a segment with logits of any kind.

    Relative to the shifts: the maxima, or 0 where there is none.
    """
    total = tl.zeros((THREADS,), tl.float32)
    ref_total = tl.zeros((THREADS,), tl.float32)
    difference = tl.zeros((THREADS,), tl.float32)
    for first in tl.range(begin, end, TILE):
        columns = first + tl.arange(0, THREADS) * GROUP
        for i in tl.static_range(GROUP):
            x = load_column(start, columns + i, end, banned, float("-inf")) - shift
            y = load_column(ref_start, columns + i, end, banned, float("-inf")) - ref_shift
            weight = power_terms(x * scale)[0]
            total += weight
            ref_total += power_terms(y * scale)[0]
            # Not where the policy has no weight: there the difference may be infinite, or a NaN.
            difference += tl.where(weight == 0, 0.0, weight * (x - y))
    return tl.sum(total, 0), tl.sum(ref_total, 0), tl.sum(difference, 0)


@triton.jit(do_not_specialize=["row_stride", "ref_row_stride", "banned", "programs"])
def segment_kl_kernel(
    logits,
    ref_logits,
    partials,
    row_stride: tl.int64,
    ref_row_stride: tl.int64,
    programs: tl.int64,
    inverse_temperature,
    banned: tl.int32,
    VOCAB: tl.constexpr,
    ALIGN: tl.constexpr,
    REF_ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One segment of one pair of rows into float32 ``partials`` [5, N * segments].

    The five: largest logit and normaliser of the policy, its weighted sum of differences, largest
    logit and normaliser of the reference.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    segments: tl.constexpr = triton.cdiv(VOCAB, SEGMENT)
    row = program // segments
    start = row_pointer(logits, row, row_stride, ALIGN)
    ref_start = row_pointer(ref_logits, row, ref_row_stride, REF_ALIGN)
    begin, pairs_end, end = segment_bounds(program % segments, VOCAB, banned)
    scale = inverse_temperature * LOG2_E
    offset = tl.load(start + begin).to(tl.float32) - tl.load(ref_start + begin).to(tl.float32)
    lowest = tl.full((THREADS,), NO_LOGIT, tl.float32)
    zero = tl.zeros((THREADS,), tl.float32)
    reference = tl.fma(lowest, scale, 0.0)
    maxima, references, sums = (lowest, lowest), (reference, reference), (zero, zero, zero)
    for first in tl.range(begin, pairs_end, TILE):
        x = load_whole(start, first, end, ALIGNED)
        y = load_whole(ref_start, first, end, ALIGNED)
        maxima, references, sums = accumulate_pair(x, y, offset, scale, maxima, references, sums)
    for first in tl.range(pairs_end, end, TILE):
        x = load_ragged(start, first, end, banned, NO_LOGIT)
        y = load_ragged(ref_start, first, end, banned, NO_LOGIT)
        maxima, references, sums = accumulate_pair(x, y, offset, scale, maxima, references, sums)

    top, ref_top = tl.max(maxima[0], 0), tl.max(maxima[1], 0)
    ratio = tl.exp2(tl.fma(top, -scale, references[0]))
    ref_ratio = tl.exp2(tl.fma(ref_top, -scale, references[1]))
    total = tl.sum(sums[0] * ratio, 0)
    ref_total = tl.sum(sums[1] * ref_ratio, 0)
    difference = tl.sum(sums[2] * ratio, 0) + ((offset - top) + ref_top) * total
    largest = tl.maximum(tl.abs(top), tl.abs(ref_top))
    # Before the branch and in it: on sm_80 there are no registers to keep them to the end.
    tl.store(partials + program, top)
    tl.store(partials + 3 * programs + program, ref_top)
    if strange(largest, scale, total + ref_total + difference):
        top = exact_maximum(start, begin, end, banned)
        tl.store(partials + program, top)
        ref_top = exact_maximum(ref_start, begin, end, banned)
        tl.store(partials + 3 * programs + program, ref_top)
        total, ref_total, difference = exact_pair(
            start, ref_start, begin, end, banned, scale,
            finite_or_zero(top), finite_or_zero(ref_top),
        )  # fmt: skip
    tl.store(partials + programs + program, total)
    tl.store(partials + 2 * programs + program, difference * inverse_temperature)
    tl.store(partials + 4 * programs + program, ref_total)


@triton.jit
def merge_differences(
    maxima, sums, differences, maximum, ref_maxima, ref_maximum, inverse_temperature
):
    """Sum of weighted differences of a row from those of its segments, with their own maxima."""
    shift = (maxima - finite_or_zero(maximum)) * inverse_temperature
    ref_shift = (finite_or_zero(ref_maxima) - finite_or_zero(ref_maximum)) * inverse_temperature
    moved = tl.exp(shift) * (differences + sums * (shift - ref_shift))
    return tl.sum(tl.where(shift > float("-inf"), moved, 0.0), 0)


@triton.jit(
    do_not_specialize=["row_stride", "banned", "programs"],
    do_not_specialize_on_alignment=[
        "logits",
        "targets",
        "log_prob_out",
        "kl_out",
        "maximum_out",
        "log_total_out",
        "ref_maximum_out",
        "mean_difference_out",
    ],
)
def row_kl_kernel(
    logits,
    targets,
    partials,
    log_prob_out,
    kl_out,
    maximum_out,
    log_total_out,
    ref_maximum_out,
    mean_difference_out,
    row_stride: tl.int64,
    programs: tl.int64,
    inverse_temperature,
    banned: tl.int32,
    VOCAB: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Combines the segments of one pair of rows."""
    n = tl.program_id(0)
    x = target_logit(logits, targets, n, row_stride, banned, VOCAB)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    _, inside, source = row_partials(partials, n, VOCAB)
    maxima = tl.load(source, mask=inside, other=float("-inf"))
    sums = tl.load(source + programs, mask=inside, other=0.0)
    differences = tl.load(source + 2 * programs, mask=inside, other=0.0)
    ref_maxima = tl.load(source + 3 * programs, mask=inside, other=float("-inf"))
    ref_sums = tl.load(source + 4 * programs, mask=inside, other=0.0)
    maximum, total, _ = merge_segments(maxima, sums, sums, inverse_temperature)
    ref_maximum, ref_total, _ = merge_segments(ref_maxima, ref_sums, ref_sums, inverse_temperature)
    difference = merge_differences(
        maxima, sums, differences, maximum, ref_maxima, ref_maximum, inverse_temperature
    )
    mean_difference = difference / total
    log_total = tl.log(total)
    tl.store(log_prob_out + n, (x - maximum) * inverse_temperature - log_total)
    tl.store(kl_out + n, mean_difference - tl.log(total / ref_total))
    tl.store(maximum_out + n, maximum)
    tl.store(log_total_out + n, log_total)
    tl.store(ref_maximum_out + n, ref_maximum)
    tl.store(mean_difference_out + n, mean_difference)


_SEGMENTS = Launcher(segment_kl_kernel)
_ROWS = Launcher(row_kl_kernel)


def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: float,
    banned_token: int | None,
) -> tuple[Tensor, Tensor, Normaliser, Divergence]:
    """Launcher: float32 [N] target log-probability and KL, and what their gradients need.

    Args:
        logits, ref_logits: float32, float16 or bfloat16 [N, V]; policy and reference.
        targets: int64 or int32 [N]; one out of range, unchecked on a GPU, gives NaN.
    """
    logits, ref_logits = prepare_logits(logits, None)[0], prepare_logits(ref_logits, None)[0]
    rows, vocab_size = logits.shape
    log_prob = logits.new_empty(rows, dtype=torch.float32)
    kl, maximum, log_total, ref_maximum, mean_difference = (
        torch.empty_like(log_prob) for _ in range(5)
    )
    normaliser = Normaliser(maximum, log_total)
    divergence = Divergence(ref_maximum, mean_difference)
    if rows == 0:
        return log_prob, kl, normaliser, divergence
    device, programs = logits.get_device(), rows * segment_count(vocab_size)
    partials = logits.new_empty(PARTIALS * programs, dtype=torch.float32)
    inverse_temperature = 1.0 / temperature
    banned = -1 if banned_token is None else banned_token
    dependent = dependent_launches(device)
    with on_device_of(logits):
        form, ref_form = layout(logits), layout(ref_logits)
        arguments = (
            logits,
            ref_logits,
            partials,
            logits.stride(0),
            ref_logits.stride(0),
            programs,
            inverse_temperature,
            banned,
            vocab_size,
            form.align,
            ref_form.align,
            form.aligned and ref_form.aligned,
            dependent,
        )
        variant = (device, vocab_size, form, ref_form)
        _SEGMENTS(programs, variant, arguments, segment_options(device, REGISTERS))
        outputs = (log_prob, kl, *normaliser, *divergence)
        row_arguments = (
            logits,
            targets.contiguous(),
            partials,
            *outputs,
            logits.stride(0),
            programs,
            inverse_temperature,
            banned,
            vocab_size,
            dependent,
        )
        row_variant = (device, vocab_size, logits.dtype, targets.dtype)
        _ROWS(rows, row_variant, row_arguments, row_options(device))
    return log_prob, kl, normaliser, divergence
