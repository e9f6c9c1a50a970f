"""Sampling in two levels with the statistics of the sample, in one pass over the logits.

Noise for every token would cost many times what memory leaves time for. A thread's columns of a
segment are a block of the vocabulary: their mass at the sampling temperature is the thread's sum.
Each block's mass is divided by a standard exponential number, and the largest quotient is drawn:
a Gumbel maximum. The tokens of that block alone are then drawn alike.
The block that wins a row is one that won its segment, so each segment draws its token itself, and
the segments' winners compete. :mod:`egspo_kernels.reference.sampling` is the definition.
"""

from __future__ import annotations

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
from egspo_kernels.triton_kernels.noise import exponentials
from egspo_kernels.triton_kernels.rows import merge_segments, row_partials
from egspo_kernels.triton_kernels.tiles import (
    GROUP,
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
    load_column,
    load_ragged,
    load_whole,
    power_terms,
    raise_maximum,
    row_pointer,
    segment_bounds,
    side_by_side,
    strange,
)
from egspo_kernels.types import SampledTokens

REGISTERS = 48
"""Of a thread: ten programs on a processor."""
FIELDS = 8
"""float32 numbers that a segment leaves behind."""


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
            x, maximum, scales[1], own, own_total, own_moment, ENTROPY == "sampling"
        )
    if ENTROPY == "own":
        apart, apart_total, apart_moment = accumulate(
            x, maximum, scales[2], apart, apart_total, apart_moment, True
        )
    return (one, own, apart), (total, own_total, apart_total), (moment, own_moment, apart_moment)


@triton.jit
def exact_sums(start, begin, end, banned, top, scale):
    """Sums of the threads relative to ``top``, the maximum of a segment with logits of any kind."""
    total = tl.zeros((THREADS,), tl.float32)
    moment = tl.zeros((THREADS,), tl.float32)
    for first in tl.range(begin, end, TILE):
        x = load_ragged(start, first, end, banned, float("-inf"))
        total, moment = accumulate_exactly(x, finite_or_zero(top), scale, total, moment)
    return total, moment


@triton.jit
def draw_token(
    start, segment, begin, end, banned, top, scale, masses, seed, step, row_id, VOCAB: tl.constexpr
):
    """Score of the block that wins a segment, and the token drawn in it.

    Args:
        masses: float32 [THREADS] relative to ``top``.
    """
    lanes = tl.arange(0, THREADS)
    block = segment * THREADS + lanes
    # The counters of blocks start at 2^31: the sign of an int32.
    counters = (block // 4) | -0x80000000
    scores = masses / exponentials(seed, step, row_id, counters, block % 4)
    best = tl.max(scores, 0)
    lane = tl.minimum(first_column(scores == best, lanes), THREADS - 1)
    columns = begin + lanes // GROUP * TILE + lane * GROUP + lanes % GROUP
    x = load_column(start, columns, end, banned, float("-inf"))
    weights, _ = power_terms((x - finite_or_zero(top)) * scale)
    races = weights / exponentials(seed, step, row_id, columns // 4, columns % 4)
    # A segment of NaN has no winner, but what is sampled must be a token.
    token = first_column(races == tl.max(races, 0), columns)
    return best, tl.minimum(token, VOCAB - 1)


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
    """Partials of one segment of one row, float32 [8, N * segments].

    In order: the largest logit, the sum at temperature 1, the sum at the sampling temperature, the
    sum and the moment at the entropy temperature; the score, the column and the logit of the
    sample. ``SAMPLING`` is "greedy", "one" (temperature 1) or "own"; ``ENTROPY`` is "one",
    "sampling" (the same temperature) or "own".
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
        both = side_by_side(left, right)
        references, totals, moments = accumulate_all(
            both, maximum, scales, references, totals, moments, SAMPLING, ENTROPY
        )
    for first in tl.range(pairs_end, end, TILE):
        x = load_ragged(start, first, end, banned, NO_LOGIT)
        maximum, place = raise_maximum(x, first, maximum, place)
        references, totals, moments = accumulate_all(
            x, maximum, scales, references, totals, moments, SAMPLING, ENTROPY
        )

    top = tl.max(maximum, 0)
    total, moment = in_units_of(top, scale, references[0], totals[0], moments[0])
    masses, own_moment = total, moment
    largest_scale = tl.maximum(own_scale, tl.maximum(entropy_scale, scale))
    if SAMPLING == "own":
        masses, own_moment = in_units_of(top, own_scale, references[1], totals[1], moments[1])
    entropy_total, entropy_moment = total, moment
    if ENTROPY == "sampling":
        entropy_total, entropy_moment = masses, own_moment
    elif ENTROPY == "own":
        entropy_total, entropy_moment = in_units_of(
            top, entropy_scale, references[2], totals[2], moments[2]
        )
    column = 0
    if SAMPLING == "greedy":
        column = largest_column(start, top, maximum, place, end, banned)
    total_sum = tl.sum(total, 0)
    own_sum = total_sum
    if SAMPLING == "own":
        own_sum = tl.sum(masses, 0)
    entropy_sum, moment_sum = total_sum, tl.sum(entropy_moment, 0)
    if ENTROPY == "sampling":
        entropy_sum = own_sum
    elif ENTROPY == "own":
        entropy_sum = tl.sum(entropy_total, 0)
    if strange(top, largest_scale, total_sum + own_sum + entropy_sum + moment_sum):
        top, column = exact_maximum(start, begin, end, banned)
        total, moment = exact_sums(start, begin, end, banned, top, scale)
        masses = total
        if SAMPLING == "own":
            masses, _ = exact_sums(start, begin, end, banned, top, own_scale)
        total_sum, own_sum = tl.sum(total, 0), tl.sum(masses, 0)
        if ENTROPY != "one":
            total, moment = exact_sums(start, begin, end, banned, top, entropy_scale)
        entropy_sum, moment_sum = tl.sum(total, 0), tl.sum(moment, 0)
    score = top
    if SAMPLING != "greedy":
        row_id = tl.load(row_ids + n)
        score, column = draw_token(
            start, segment, begin, end, banned, top, own_scale, masses, seed, step, row_id, VOCAB
        )
    column = tl.minimum(column, VOCAB - 1)
    place_out = partials + program
    tl.store(place_out, top)
    tl.store(place_out + programs, total_sum)
    tl.store(place_out + 2 * programs, own_sum)
    tl.store(place_out + 3 * programs, entropy_sum)
    tl.store(place_out + 4 * programs, moment_sum * LN_2)
    tl.store(place_out + 5 * programs, score)
    tl.store(place_out + 6 * programs, column.to(tl.float32, bitcast=True))
    tl.store(place_out + 7 * programs, tl.load(start + column).to(tl.float32))


@triton.jit(do_not_specialize=["programs"])
def row_sample_kernel(
    partials,
    token_out,
    log_prob_out,
    confidence_out,
    entropy_out,
    programs: tl.int64,
    inverse_temperature,
    inverse_entropy_temperature,
    SAMPLING: tl.constexpr,
    VOCAB: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Combines the segments of one row: the sample, and its statistics."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0)
    _, inside, place = row_partials(partials, n, VOCAB)
    maxima = tl.load(place, mask=inside, other=float("-inf"))
    totals = tl.load(place + programs, mask=inside, other=0.0)
    sampling_totals = tl.load(place + 2 * programs, mask=inside, other=0.0)
    entropy_totals = tl.load(place + 3 * programs, mask=inside, other=0.0)
    moments = tl.load(place + 4 * programs, mask=inside, other=0.0)
    scores = tl.load(place + 5 * programs, mask=inside, other=float("-inf"))
    tokens = tl.load(place + 6 * programs, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    logits = tl.load(place + 7 * programs, mask=inside, other=float("-inf"))

    maximum, entropy_total, moment = merge_segments(
        maxima, entropy_totals, moments, inverse_entropy_temperature
    )
    shift = maxima - finite_or_zero(maximum)
    sampling_scale = tl.exp(shift * inverse_temperature)
    if SAMPLING != "greedy":
        scores = tl.where(inside, scores * sampling_scale, -1.0)
    # A row of NaN has no best score: what is sampled must still be a token.
    best = tl.max(scores, 0)
    token = tl.minimum(first_column(inside & (scores == best), tokens), VOCAB - 1)
    x = tl.max(tl.where(inside & (tokens == token), logits, float("-inf")), 0) - maximum
    confidence = tl.exp(x) / tl.sum(totals * tl.exp(shift), 0)
    tl.store(entropy_out + n, tl.log(entropy_total) - moment / entropy_total)
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
    with on_device_of(logits):
        arguments = (
            logits,
            row_ids.contiguous(),
            partials,
            seed,
            step,
            logits.stride(0),
            programs,
            inverse_temperature,
            inverse_entropy_temperature,
            -1 if banned_token is None else banned_token,
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
            partials,
            *sampled,
            programs,
            inverse_temperature,
            inverse_entropy_temperature,
            mode,
            vocab_size,
            dependent,
        )
        _ROWS(count, (device, vocab_size, mode), row_arguments, row_options(device))
    return sampled
