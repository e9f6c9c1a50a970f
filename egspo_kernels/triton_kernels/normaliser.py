"""Target log-probabilities, and the two numbers per row from which a gradient remakes the softmax.

The first kernel is the one of ``token_stats``: the log-probabilities agree with its to the bit.
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
    on_device_of,
    prepare_logits,
    row_options,
    segment_count,
)
from egspo_kernels.triton_kernels.rows import merge_segments, row_partials, segment_statistics


class Normaliser(NamedTuple):
    """``log p(x) = (x - maximum) / temperature - log_total``; float32 [N] each.

    The two are kept apart: their sum, the log-sum-exp, would lose the bits that a large common
    offset of the logits takes.
    """

    maximum: Tensor
    log_total: Tensor


@triton.jit
def target_logit(logits, targets, n, row_stride, banned, VOCAB):
    """Logit of the target of row ``n``: -inf if it is banned, NaN if it is out of range."""
    target = tl.load(targets + n).to(tl.int64)
    valid = (target >= 0) & (target < VOCAB)
    offset = n.to(tl.int64) * row_stride + target
    x = tl.load(logits + offset, mask=valid, other=float("nan")).to(tl.float32)
    return tl.where(valid & (target == banned), float("-inf"), x)


@triton.jit(
    do_not_specialize=["row_stride", "banned", "programs"],
    do_not_specialize_on_alignment=[
        "logits",
        "targets",
        "log_prob_out",
        "maximum_out",
        "log_total_out",
    ],
)
def row_normaliser_kernel(
    logits,
    targets,
    partials,
    log_prob_out,
    maximum_out,
    log_total_out,
    row_stride: tl.int64,
    programs: tl.int64,
    inverse_temperature,
    banned: tl.int32,
    VOCAB: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Combines the segments of one row, as ``row_statistics_kernel`` does."""
    n = tl.program_id(0)
    x = target_logit(logits, targets, n, row_stride, banned, VOCAB)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    _, inside, source = row_partials(partials, n, VOCAB)
    maxima = tl.load(source, mask=inside, other=float("-inf"))
    sums = tl.load(source + programs, mask=inside, other=0.0)
    maximum, total, _ = merge_segments(maxima, sums, sums, inverse_temperature)
    log_total = tl.log(total)
    tl.store(maximum_out + n, maximum)
    tl.store(log_total_out + n, log_total)
    tl.store(log_prob_out + n, (x - maximum) * inverse_temperature - log_total)


_ROWS = Launcher(row_normaliser_kernel)


def log_probs(
    logits: Tensor, targets: Tensor, temperature: float, banned_token: int | None
) -> tuple[Tensor, Normaliser]:
    """Launcher: float32 [N] log-probability of the targets, and what the gradient needs.

    Args:
        logits: float32, float16 or bfloat16 [N, V].
        targets: int64 or int32 [N]; one out of range, unchecked on a GPU, gives NaN.
    """
    logits, _ = prepare_logits(logits, None)
    rows, vocab_size = logits.shape
    log_prob = logits.new_empty(rows, dtype=torch.float32)
    maximum, log_total = torch.empty_like(log_prob), torch.empty_like(log_prob)
    if rows:
        device = logits.get_device()
        with on_device_of(logits):
            partials = segment_statistics(logits, None, temperature, banned_token, rows)
            arguments = (
                logits,
                targets.contiguous(),
                partials,
                log_prob,
                maximum,
                log_total,
                logits.stride(0),
                rows * segment_count(vocab_size),
                1.0 / temperature,
                -1 if banned_token is None else banned_token,
                vocab_size,
                dependent_launches(device),
            )
            variant = (device, vocab_size, logits.dtype, targets.dtype)
            _ROWS(rows, variant, arguments, row_options(device))
    return log_prob, Normaliser(maximum, log_total)
