"""Exact KL divergence over the vocabulary: policy and reference rows are each read once.

With x the policy's logits and y the reference's, each less its largest and divided by the
temperature, ``KL = E_p[x - y] - log(sum e^x / sum e^y)``. Both terms are as small as the policies
are close, where the difference of two log-softmaxes would cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from egspo_kernels.triton_kernels.normaliser import Normaliser, target_log_prob
from egspo_kernels.triton_kernels.rows import (
    LOG2_E,
    OPTIONS,
    STATISTICS_BLOCK,
    alignment,
    block_count,
    finite_or_zero,
    load_block,
    merge_blocks,
    on_device_of,
    power_terms,
    prepare_logits,
    row_partials,
    row_pointer,
    statistics_arguments,
)

PARTIALS = 5
"""float32 numbers that a block leaves behind."""


class Divergence(NamedTuple):
    """What the gradient of the KL needs beside the policy's normaliser; float32 [N] each."""

    ref_maximum: Tensor
    """Largest reference logit."""
    mean_difference: Tensor
    """``E_p[x - y]``, x and y as above."""


@triton.jit(do_not_specialize=["row_stride", "ref_row_stride", "banned", "programs"])
def block_kl_kernel(
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
    BLOCK: tl.constexpr,
):
    """One block of one pair of rows into float32 ``partials`` [5, N * blocks].

    The five: largest logit and normaliser of the policy, its weighted sum of differences, largest
    logit and normaliser of the reference.
    """
    program = tl.program_id(0)
    blocks: tl.constexpr = triton.cdiv(VOCAB, BLOCK)
    row, first = program // blocks, program % blocks * BLOCK
    x = load_block(row_pointer(logits, row, row_stride, ALIGN), first, VOCAB, banned, BLOCK)
    ref_start = row_pointer(ref_logits, row, ref_row_stride, REF_ALIGN)
    y = load_block(ref_start, first, VOCAB, banned, BLOCK)
    maximum, ref_maximum = tl.max(x, 0), tl.max(y, 0)
    x -= finite_or_zero(maximum)
    y -= finite_or_zero(ref_maximum)
    scale = inverse_temperature * LOG2_E
    weight, _ = power_terms(x * scale)
    ref_weight, _ = power_terms(y * scale)
    # Not where the policy has no weight: there the difference may be infinite, or a NaN.
    difference = tl.where(weight == 0, 0.0, weight * (x - y))
    tl.store(partials + program, maximum)
    tl.store(partials + programs + program, tl.sum(weight, 0))
    tl.store(partials + 2 * programs + program, tl.sum(difference, 0) * inverse_temperature)
    tl.store(partials + 3 * programs + program, ref_maximum)
    tl.store(partials + 4 * programs + program, tl.sum(ref_weight, 0))


@triton.jit
def merge_differences(
    maxima, sums, differences, maximum, ref_maxima, ref_maximum, inverse_temperature
):
    """Sum of weighted differences of a row from those of its blocks, which had their own maxima."""
    shift = (maxima - finite_or_zero(maximum)) * inverse_temperature
    ref_shift = (finite_or_zero(ref_maxima) - finite_or_zero(ref_maximum)) * inverse_temperature
    moved = tl.exp(shift) * (differences + sums * (shift - ref_shift))
    return tl.sum(tl.where(shift > float("-inf"), moved, 0.0), 0)


@triton.jit(
    do_not_specialize=["row_stride", "banned", "programs"],
    do_not_specialize_on_alignment=[
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
    BLOCK: tl.constexpr,
):
    """Combines the blocks of one pair of rows."""
    n = tl.program_id(0)
    _, inside, source = row_partials(partials, n, VOCAB, BLOCK)
    maxima = tl.load(source, mask=inside, other=float("-inf"))
    sums = tl.load(source + programs, mask=inside, other=0.0)
    differences = tl.load(source + 2 * programs, mask=inside, other=0.0)
    ref_maxima = tl.load(source + 3 * programs, mask=inside, other=float("-inf"))
    ref_sums = tl.load(source + 4 * programs, mask=inside, other=0.0)
    maximum, total, _ = merge_blocks(maxima, sums, sums, inverse_temperature)
    ref_maximum, ref_total, _ = merge_blocks(ref_maxima, ref_sums, ref_sums, inverse_temperature)
    difference = merge_differences(
        maxima, sums, differences, maximum, ref_maxima, ref_maximum, inverse_temperature
    )
    mean_difference = difference / total
    log_total = tl.log(total)
    log_prob = target_log_prob(
        logits, targets, n, row_stride, maximum, log_total, inverse_temperature, banned, VOCAB
    )
    tl.store(log_prob_out + n, log_prob)
    tl.store(kl_out + n, mean_difference - tl.log(total / ref_total))
    tl.store(maximum_out + n, maximum)
    tl.store(log_total_out + n, log_total)
    tl.store(ref_maximum_out + n, ref_maximum)
    tl.store(mean_difference_out + n, mean_difference)


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
    programs = rows * block_count(vocab_size, STATISTICS_BLOCK)
    partials = logits.new_empty((PARTIALS, programs), dtype=torch.float32)
    outputs = [logits.new_empty(rows, dtype=torch.float32) for _ in range(6)]
    if rows:
        scalars = statistics_arguments(logits, programs, temperature, banned_token)
        with on_device_of(logits):
            block_kl_kernel[(programs,)](
                logits,
                ref_logits,
                partials,
                ref_row_stride=ref_logits.stride(0),
                ALIGN=alignment(logits),
                REF_ALIGN=alignment(ref_logits),
                **scalars,
                **OPTIONS,
            )
            row_kl_kernel[(rows,)](
                logits,
                targets.contiguous(),
                partials,
                *outputs,
                **scalars,
                **(OPTIONS | {"num_warps": 1}),
            )
    log_prob, kl, maximum, log_total, ref_maximum, mean_difference = outputs
    return (
        log_prob,
        kl,
        Normaliser(maximum, log_total),
        Divergence(ref_maximum, mean_difference),
    )
