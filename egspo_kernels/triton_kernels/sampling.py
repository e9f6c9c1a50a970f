"""Sampling in two levels with the statistics of the sample, in one pass over the logits.

Noise for every token would cost many times what memory leaves time for. A thread's columns of a
segment are a block of the vocabulary: their mass at the sampling temperature is the thread's sum.
Each block's mass is divided by a standard exponential number, and the largest quotient is drawn:
a Gumbel maximum. The tokens of that block alone are then drawn alike, by the kernel that combines
the segments of a row. :mod:`egspo_kernels.reference.sampling` is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from egspo_kernels.triton_kernels.draws import block_noise, draw_token, exchange
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
from egspo_kernels.triton_kernels.rows import entropy_of, merge_segments, row_partials
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
from egspo_kernels.types import SampledTokens

REGISTERS = 48
"""Of a thread: ten programs on a processor."""
FIELDS = 7
"""float32 numbers that a segment leaves behind."""
SPARED = tl.constexpr(4)
"""At a second temperature one power in so many is left to the units that add and multiply: two
powers of every logit are more than the special unit takes in the time of the memory."""


@triton.jit
def accumulate_all(x, maximum, scales, references, totals, moments, SAMPLING, ENTROPY):
    """:func:`accumulate` at temperature 1, the sampling and the entropy temperature.

    What is the same for two of them, or used by none, is computed once, or not at all.
    """
    one, own, apart = references
    one, total, moment = accumulate(
        x, maximum, scales[0], one, totals[0], moments[0], ENTROPY == "one"
    )
    own_total, own_moment, apart_total, apart_moment = totals[1], moments[1], totals[2], moments[2]
    if SAMPLING == "own":
        own, own_total, own_moment = accumulate(
            x, maximum, scales[1], own, own_total, own_moment, ENTROPY == "sampling", SPARED
        )
    if ENTROPY == "own":
        apart, apart_total, apart_moment = accumulate(
            x, maximum, scales[2], apart, apart_total, apart_moment, True, SPARED
        )
    return (one, own, apart), (total, own_total, apart_total), (moment, own_moment, apart_moment)


@triton.jit
def exact_sums(start, begin, end, banned, scales, SAMPLING: tl.constexpr, ENTROPY: tl.constexpr):
    """Of a segment with logits of any kind, relative to its maximum.

    The maximum, its column, and the threads' sums: at temperature 1, at the sampling temperature,
    and the sum and the moment at the entropy temperature.
    """
    top = exact_maximum(start, begin, end, banned)
    shift = finite_or_zero(top)
    column = tl.full((THREADS,), 0x7FFFFFFF, tl.int32)
    zero = tl.zeros((THREADS,), tl.float32)
    total, own, entropy_total, moment, own_moment, unused = zero, zero, zero, zero, zero, zero
    for first in tl.range(begin, end, TILE):
        x = load_ragged(start, first, end, banned, float("-inf"))
        column = lowest_column(x, top, first, column)
        total, unused = accumulate_exactly(x, shift, scales[0], total, unused)
        if SAMPLING == "own":
            own, own_moment = accumulate_exactly(x, shift, scales[1], own, own_moment)
        if ENTROPY == "own":
            entropy_total, moment = accumulate_exactly(x, shift, scales[2], entropy_total, moment)
    if SAMPLING != "own":
        own, own_moment = total, unused
    if ENTROPY == "one":
        entropy_total, moment = total, unused
    elif ENTROPY == "sampling":
        entropy_total, moment = own, own_moment
    return top, tl.min(column, 0), total, own, entropy_total, moment


@triton.jit(
    do_not_specialize=["seed", "step", "row_stride", "programs", "banned"],
    do_not_specialize_on_alignment=["row_ids"],
)
def segment_sample_kernel(
    logits,
    row_ids,
    partials,
    seed: tl.int64,
    step: tl.int64,
    row_stride: tl.int64,
    programs: tl.int64,
    inverse_temperature,
    inverse_entropy_temperature,
    banned: tl.int32,
    SAMPLING: tl.constexpr,
    ENTROPY: tl.constexpr,
    VOCAB: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Partials of one segment of one row, float32 [FIELDS, N * segments].

    In order: the largest logit, the sum at temperature 1, the sum at the sampling temperature, the
    sum and the moment at the entropy temperature; the score of the sample and its thread, or, where
    sampling is greedy, the largest logit and its column. ``SAMPLING`` is "greedy", "one"
    (temperature 1) or "own"; ``ENTROPY`` is "one", "sampling" (the same temperature) or "own".
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    segments: tl.constexpr = triton.cdiv(VOCAB, SEGMENT)
    n, segment = program // segments, program % segments
    start = row_pointer(logits, n, row_stride, ALIGN)
    begin, pairs_end, end = segment_bounds(segment, VOCAB, banned)
    scale: tl.constexpr = LOG2_E
    own_scale = inverse_temperature * LOG2_E
    entropy_scale = inverse_entropy_temperature * LOG2_E
    scales = (scale, own_scale, entropy_scale)
    maximum = tl.full((THREADS,), NO_LOGIT, tl.float32)
    place = tl.zeros((THREADS,), tl.int32)
    zero = tl.zeros((THREADS,), tl.float32)
    references = (
        tl.fma(maximum, zero + scale, 0.0),
        tl.fma(maximum, own_scale, 0.0),
        tl.fma(maximum, entropy_scale, 0.0),
    )
    totals, moments = (zero, zero, zero), (zero, zero, zero)
    for first in tl.range(begin, pairs_end, 2 * TILE):
        left = load_whole(start, first, end, ALIGNED)
        right = load_whole(start, first + TILE, end, ALIGNED)
        maximum, place = raise_maximum(left, first, maximum, place)
        maximum, place = raise_maximum(right, first + TILE, maximum, place)
        references, totals, moments = accumulate_all(
            left + right, maximum, scales, references, totals, moments, SAMPLING, ENTROPY
        )
    for first in tl.range(pairs_end, end, TILE):
        x = load_ragged(start, first, end, banned, NO_LOGIT)
        maximum, place = raise_maximum(x, first, maximum, place)
        references, totals, moments = accumulate_all(
            x, maximum, scales, references, totals, moments, SAMPLING, ENTROPY
        )

    top = tl.max(maximum, 0)
    total, moment = in_units_of(top, scale, references[0], totals[0], moments[0])
    own, own_moment = total, moment
    if SAMPLING == "own":
        own, own_moment = in_units_of(top, own_scale, references[1], totals[1], moments[1])
    entropy_total, entropy_moment = total, moment
    if ENTROPY == "sampling":
        entropy_total, entropy_moment = own, own_moment
    elif ENTROPY == "own":
        entropy_total, entropy_moment = in_units_of(
            top, entropy_scale, references[2], totals[2], moments[2]
        )
    column = tl.full((), 0, tl.int32)
    if SAMPLING == "greedy":
        column = largest_column(start, top, maximum, place, end, banned)
    noise = zero
    if SAMPLING != "greedy":
        noise = block_noise(segment, seed, step, tl.load(row_ids + n))
    sums = exchange(total, own, entropy_total, entropy_moment, noise, SAMPLING)
    largest_scale = tl.maximum(own_scale, tl.maximum(entropy_scale, scale))
    if strange(top, largest_scale, sums[0] + sums[1] + sums[2] + sums[3]):
        top, column, total, own, entropy_total, entropy_moment = exact_sums(
            start, begin, end, banned, scales, SAMPLING, ENTROPY
        )
        sums = exchange(total, own, entropy_total, entropy_moment, noise, SAMPLING)
    score = top
    if SAMPLING != "greedy":
        score, column = sums[4], sums[5]
    out = partials + program
    tl.store(out, top)
    tl.store(out + programs, sums[0])
    tl.store(out + 2 * programs, sums[1])
    tl.store(out + 3 * programs, sums[2])
    tl.store(out + 4 * programs, sums[3] * LN_2)
    tl.store(out + 5 * programs, score)
    tl.store(out + 6 * programs, column.to(tl.float32, bitcast=True))


@triton.jit(
    do_not_specialize=["seed", "step", "row_stride", "programs", "banned"],
    do_not_specialize_on_alignment=["logits", "row_ids"],
)
def row_sample_kernel(
    logits,
    row_ids,
    partials,
    token_out,
    log_prob_out,
    confidence_out,
    entropy_out,
    seed: tl.int64,
    step: tl.int64,
    row_stride: tl.int64,
    programs: tl.int64,
    inverse_temperature,
    inverse_entropy_temperature,
    banned: tl.int32,
    SAMPLING: tl.constexpr,
    VOCAB: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Combines the segments of one row: the sample, and its statistics."""
    n = tl.program_id(0)
    row_id = tl.load(row_ids + n)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    segments, inside, place = row_partials(partials, n, VOCAB)
    maxima = tl.load(place, mask=inside, other=float("-inf"))
    totals = tl.load(place + programs, mask=inside, other=0.0)
    sampling_totals = tl.load(place + 2 * programs, mask=inside, other=0.0)
    entropy_totals = tl.load(place + 3 * programs, mask=inside, other=0.0)
    moments = tl.load(place + 4 * programs, mask=inside, other=0.0)
    scores = tl.load(place + 5 * programs, mask=inside, other=float("-inf"))
    columns = tl.load(place + 6 * programs, mask=inside, other=0.0).to(tl.int32, bitcast=True)

    maximum, entropy_total, moment = merge_segments(
        maxima, entropy_totals, moments, inverse_entropy_temperature
    )
    shift = maxima - finite_or_zero(maximum)
    sampling_scale = tl.exp(shift * inverse_temperature)
    if SAMPLING != "greedy":
        scores = tl.where(inside, scores * sampling_scale, -1.0)
    # A row of NaN has no best score: what is sampled must still be a token.
    best = tl.max(scores, 0)
    segment = tl.minimum(
        first_column(inside & (scores == best), segments), triton.cdiv(VOCAB, SEGMENT) - 1
    )
    column = tl.sum(tl.where(segments == segment, columns, 0), 0)
    token, logit = tl.minimum(column, VOCAB - 1), best
    if SAMPLING != "greedy":
        top = tl.sum(tl.where(segments == segment, maxima, 0.0), 0)
        token, logit = draw_token(
            logits + n.to(tl.int64) * row_stride, segment, column, banned, top,
            inverse_temperature * LOG2_E, seed, step, row_id, VOCAB,
        )  # fmt: skip
    x = logit - maximum
    confidence = tl.exp(x) / tl.sum(totals * tl.exp(shift), 0)
    entropy = entropy_of(tl.log(entropy_total), entropy_total, moment)
    tl.store(entropy_out + n, entropy)
    tl.store(token_out + n, token.to(tl.int64))
    tl.store(confidence_out + n, confidence)
    if SAMPLING == "greedy":
        tl.store(log_prob_out + n, 0.0)
    else:
        sampling_total = tl.sum(sampling_totals * sampling_scale, 0)
        tl.store(log_prob_out + n, x * inverse_temperature - tl.log(sampling_total))


_SEGMENTS = Launcher(segment_sample_kernel)
_ROWS = Launcher(row_sample_kernel)


def sample_tokens(
    logits: Tensor,
    temperature: float,
    seed: int,
    step: int,
    row_ids: Tensor,
    banned_token: int | None,
    entropy_temperature: float,
) -> SampledTokens:
    """Launcher; arguments and results as :func:`egspo_kernels.sample_tokens`.

    Args:
        seed: as a signed 64-bit integer.
    """
    logits, _ = prepare_logits(logits, None)
    count, vocab_size = logits.shape
    token = logits.new_empty(count, dtype=torch.int64)
    log_prob = logits.new_empty(count, dtype=torch.float32)
    confidence, entropy = torch.empty_like(log_prob), torch.empty_like(log_prob)
    sampled = SampledTokens(token, log_prob, confidence, entropy)
    if count == 0:
        return sampled
    device, programs = logits.get_device(), count * segment_count(vocab_size)
    partials = logits.new_empty(FIELDS * programs, dtype=torch.float32)
    shared = entropy_temperature == temperature
    mode = "greedy" if temperature == 0 else "one" if temperature == 1 else "own"
    entropy_mode = "one" if entropy_temperature == 1 else "sampling" if shared else "own"
    inverse_temperature = 1.0 if temperature == 0 else 1.0 / temperature
    inverse_entropy_temperature = 1.0 / entropy_temperature
    dependent, form = dependent_launches(device), layout(logits)
    banned = -1 if banned_token is None else banned_token
    row_ids = row_ids.contiguous()
    with on_device_of(logits):
        arguments = (
            logits,
            row_ids,
            partials,
            seed,
            step,
            logits.stride(0),
            programs,
            inverse_temperature,
            inverse_entropy_temperature,
            banned,
            mode,
            entropy_mode,
            vocab_size,
            form.align,
            form.aligned,
            dependent,
        )
        variant = (device, vocab_size, mode, entropy_mode, form)
        _SEGMENTS(programs, variant, arguments, segment_options(device, REGISTERS))
        row_arguments = (
            logits,
            row_ids,
            partials,
            *sampled,
            seed,
            step,
            logits.stride(0),
            programs,
            inverse_temperature,
            inverse_entropy_temperature,
            banned,
            mode,
            vocab_size,
            dependent,
        )
        row_variant = (device, vocab_size, mode, logits.dtype)
        _ROWS(count, row_variant, row_arguments, row_options(device))
    return sampled
