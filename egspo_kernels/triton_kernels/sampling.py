"""Gumbel-max sampling with the statistics of the sample, in one pass over the logits.

``argmax(x / T + g)`` is taken as ``argmax(e^((x - max) / T) / e^-g)``: ``e^-g`` is a standard
exponential, one logarithm instead of two, and the numerators are those of the normaliser. Where
they underflow nothing is lost: noise spans 26, so a token 87 below the largest is never sampled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from egspo_kernels.triton_kernels.noise import exponential_block
from egspo_kernels.triton_kernels.rows import (
    LN_2,
    LOG2_E,
    OPTIONS,
    alignment,
    block_count,
    block_size,
    finite_or_zero,
    first_column,
    load_block,
    locate_row,
    merge_blocks,
    on_device_of,
    power_terms,
    prepare_logits,
    row_partials,
    row_pointer,
)
from egspo_kernels.types import SampledTokens

FIELDS = 7


@triton.jit(do_not_specialize=["seed", "step", "row_count", "row_stride", "programs", "banned"])
def block_sample_kernel(
    logits,
    row_ids,
    partials,
    seed: tl.int64,
    step: tl.int64,
    row_count: tl.int64,
    row_stride: tl.int64,
    programs: tl.int64,
    inverse_temperature,
    inverse_entropy_temperature,
    banned: tl.int32,
    SAMPLING: tl.constexpr,
    ENTROPY: tl.constexpr,
    VOCAB: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partials of one block of one row, float32 [7, N * blocks].

    In order: the largest logit, the sum at temperature 1, the sum at the sampling temperature, the
    sum and the moment at the entropy temperature, the score and the column of the sample.
    ``SAMPLING`` is "greedy", "one" (temperature 1) or "own"; ``ENTROPY`` is "one", "sampling" (the
    same temperature) or "own".
    """
    program = tl.program_id(0)
    blocks: tl.constexpr = triton.cdiv(VOCAB, BLOCK)
    n, block = program // blocks, program % blocks
    row, width = locate_row(None, n, row_count, VOCAB)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    start = row_pointer(logits, row, row_stride, ALIGN)
    x = load_block(start, block * BLOCK, width, banned, BLOCK)
    maximum = tl.max(x, 0)
    shifted = (x - finite_or_zero(maximum)) * LOG2_E
    weight, moment = power_terms(shifted)
    sampling_weight, sampling_moment = weight, moment
    if SAMPLING == "own":
        sampling_weight, sampling_moment = power_terms(shifted * inverse_temperature)
    entropy_weight, entropy_moment = weight, moment
    if ENTROPY == "sampling":
        entropy_weight, entropy_moment = sampling_weight, sampling_moment
    elif ENTROPY == "own":
        entropy_weight, entropy_moment = power_terms(shifted * inverse_entropy_temperature)
    score = x
    if SAMPLING != "greedy":
        score = sampling_weight / exponential_block(seed, step, tl.load(row_ids + n), block, BLOCK)
    best = tl.max(score, 0)
    token = first_column(score == best, columns)
    place = partials + program
    tl.store(place, maximum)
    tl.store(place + programs, tl.sum(weight, 0))
    tl.store(place + 2 * programs, tl.sum(sampling_weight, 0))
    tl.store(place + 3 * programs, tl.sum(entropy_weight, 0))
    tl.store(place + 4 * programs, tl.sum(entropy_moment, 0) * LN_2)
    tl.store(place + 5 * programs, best)
    tl.store(place + 6 * programs, token.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["row_stride", "programs"])
def row_sample_kernel(
    logits,
    partials,
    token_out,
    log_prob_out,
    confidence_out,
    entropy_out,
    row_stride: tl.int64,
    programs: tl.int64,
    inverse_temperature,
    inverse_entropy_temperature,
    SAMPLING: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combines the blocks of one row: the sample, and its statistics."""
    n = tl.program_id(0)
    _, inside, place = row_partials(partials, n, VOCAB, BLOCK)
    maxima = tl.load(place, mask=inside, other=float("-inf"))
    totals = tl.load(place + programs, mask=inside, other=0.0)
    sampling_totals = tl.load(place + 2 * programs, mask=inside, other=0.0)
    entropy_totals = tl.load(place + 3 * programs, mask=inside, other=0.0)
    moments = tl.load(place + 4 * programs, mask=inside, other=0.0)
    scores = tl.load(place + 5 * programs, mask=inside, other=float("-inf"))
    tokens = tl.load(place + 6 * programs, mask=inside, other=0.0).to(tl.int32, bitcast=True)

    maximum, entropy_total, moment = merge_blocks(
        maxima, entropy_totals, moments, inverse_entropy_temperature
    )
    tl.store(entropy_out + n, tl.log(entropy_total) - moment / entropy_total)

    shift = maxima - finite_or_zero(maximum)
    sampling_scale = tl.exp(shift * inverse_temperature)
    if SAMPLING != "greedy":
        scores = tl.where(inside, scores * sampling_scale, -1.0)
    # A row of NaN has no best score: what is sampled must still be a token.
    best = tl.max(scores, 0)
    token = tl.minimum(first_column(inside & (scores == best), tokens), VOCAB - 1)
    tl.store(token_out + n, token.to(tl.int64))
    x = tl.load(logits + n.to(tl.int64) * row_stride + token).to(tl.float32) - maximum
    tl.store(confidence_out + n, tl.exp(x) / tl.sum(totals * tl.exp(shift), 0))
    if SAMPLING == "greedy":
        tl.store(log_prob_out + n, 0.0)
    else:
        sampling_total = tl.sum(sampling_totals * sampling_scale, 0)
        tl.store(log_prob_out + n, x * inverse_temperature - tl.log(sampling_total))


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
    programs = count * block_count(vocab_size)
    token = logits.new_empty(count, dtype=torch.int64)
    log_prob, confidence, entropy = (logits.new_empty(count, dtype=torch.float32) for _ in range(3))
    sampled = SampledTokens(token, log_prob, confidence, entropy)
    if count == 0:
        return sampled
    partials = logits.new_empty((FIELDS, programs), dtype=torch.float32)
    scalars = {
        "row_stride": logits.stride(0),
        "programs": programs,
        "inverse_temperature": 1.0 if temperature == 0 else 1.0 / temperature,
        "inverse_entropy_temperature": 1.0 / entropy_temperature,
        "SAMPLING": {0.0: "greedy", 1.0: "one"}.get(float(temperature), "own"),
        "VOCAB": vocab_size,
        "BLOCK": block_size(vocab_size),
    }
    shared = entropy_temperature == temperature
    with on_device_of(logits):
        block_sample_kernel[(programs,)](
            logits,
            row_ids.contiguous(),
            partials,
            seed,
            step,
            count,
            banned=-1 if banned_token is None else banned_token,
            ENTROPY="one" if entropy_temperature == 1.0 else "sampling" if shared else "own",
            ALIGN=alignment(logits),
            **scalars,
            **OPTIONS,
        )
        row_sample_kernel[(count,)](
            logits, partials, *sampled, **scalars, **(OPTIONS | {"num_warps": 1})
        )
    return sampled
