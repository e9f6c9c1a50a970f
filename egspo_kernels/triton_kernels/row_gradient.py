"""Gradient of the statistics of a row with respect to its logits, in one pass.

With z the tempered logits, p their softmax, H its entropy and d the difference of shifted policy
and reference logits, the gradient of

    c log p(target) + l logsumexp + h entropy + b KL(p, p_ref)

with respect to z is

    c onehot + p (l - c - h (log p + H) + b (d - E_p[d])).

A row whose coefficients are all zero gets zeros, and its logits are not read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from egspo_kernels.triton_kernels.kl import Divergence
from egspo_kernels.triton_kernels.launch import (
    Launcher,
    contiguous,
    dtype_of,
    layout,
    on_device_of,
    prepare_logits,
)
from egspo_kernels.triton_kernels.normaliser import Normaliser
from egspo_kernels.triton_kernels.tiles import LN_2, LOG2_E, finite_or_zero, row_pointer

MAX_BLOCK = 4096
"""Columns of a block, unless the vocabulary is smaller: 16 in the registers of each of 256 threads,
and few enough that several programs share a processor and hide each other's loads."""
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}

FAR = tl.constexpr(1e20)
"""Nothing this far below the largest logit has a probability, at any sensible temperature."""


class Coefficients(NamedTuple):
    """Gradient of the loss with respect to each statistic; None where it has no part in it.

    All float32, [N], or [S] where rows are given their steps.
    """

    log_prob: Tensor | None = None
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None


@triton.jit
def load_block(start, first, width, banned, BLOCK: tl.constexpr):
    """float32 logits of the block whose first column is ``first``; only its block drops a token."""
    columns = first + tl.arange(0, BLOCK)
    logits = tl.load(start + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    if (banned >= first) & (banned < first + BLOCK):
        logits = tl.where(columns == banned, float("-inf"), logits)
    return logits


@triton.jit
def load_number(numbers, row):
    """A number of the row; 0 if there is none."""
    return 0.0 if numbers is None else tl.load(numbers + row)


@triton.jit
def load_coefficient(coefficients, index, valid, factor):
    """A coefficient times the incoming gradient; 0 if there is none, NaN for a step out of range"""
    if coefficients is None:
        value = 0.0
    else:
        value = tl.load(coefficients + index, mask=valid, other=float("nan")) * factor
    return value


@triton.jit(
    do_not_specialize=["row_stride", "ref_row_stride", "grad_row_stride", "banned", "num_steps"],
    do_not_specialize_on_alignment=[
        "targets",
        "maximum",
        "log_total",
        "entropy",
        "ref_maximum",
        "mean_difference",
        "step_ids",
        "log_prob_coefficient",
        "logsumexp_coefficient",
        "entropy_coefficient",
        "kl_coefficient",
        "scale",
    ],
)
def row_gradient_kernel(
    gradient,
    logits,
    ref_logits,
    targets,
    maximum,
    log_total,
    entropy,
    ref_maximum,
    mean_difference,
    step_ids,
    log_prob_coefficient,
    logsumexp_coefficient,
    entropy_coefficient,
    kl_coefficient,
    scale,
    grad_row_stride: tl.int64,
    row_stride: tl.int64,
    ref_row_stride: tl.int64,
    num_steps: tl.int64,
    inverse_temperature,
    banned: tl.int32,
    VOCAB: tl.constexpr,
    ALIGN: tl.constexpr,
    REF_ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row; ``gradient`` may be ``logits``."""
    program = tl.program_id(0)
    blocks: tl.constexpr = triton.cdiv(VOCAB, BLOCK)
    row, first = program // blocks, program % blocks * BLOCK
    columns = first + tl.arange(0, BLOCK)
    if step_ids is None:
        index, valid = row.to(tl.int64), True
    else:
        index = tl.load(step_ids + row).to(tl.int64)
        valid = (index >= 0) & (index < num_steps)
    factor = inverse_temperature if scale is None else inverse_temperature * tl.load(scale)
    c = load_coefficient(log_prob_coefficient, index, valid, factor)
    l = load_coefficient(logsumexp_coefficient, index, valid, factor)  # noqa: E741
    h = load_coefficient(entropy_coefficient, index, valid, factor)
    b = load_coefficient(kl_coefficient, index, valid, factor)
    # What is read beside the logits, before the branch: these loads wait for none of the others.
    shift = finite_or_zero(tl.load(maximum + row))
    log2_total = tl.load(log_total + row) * LOG2_E
    row_entropy = load_number(entropy, row)
    ref_shift = load_number(ref_maximum, row)
    mean = load_number(mean_difference, row)
    target = -1 if targets is None else tl.load(targets + row)
    place = row_pointer(gradient, row, grad_row_stride, GRAD_ALIGN) + columns
    if (c != 0) | (l != 0) | (h != 0) | (b != 0):
        x = load_block(row_pointer(logits, row, row_stride, ALIGN), first, VOCAB, banned, BLOCK)
        y = x
        if kl_coefficient is not None:
            # Where the KL has no part in the loss, the reference row is not read.
            reads = b != 0
            width = tl.where(reads, VOCAB, 0)
            ref_start = row_pointer(ref_logits, row, ref_row_stride, REF_ALIGN)
            y = load_block(ref_start, first, width, banned, BLOCK)
            y -= tl.where(reads, finite_or_zero(ref_shift), 0.0)
            mean = tl.where(reads, mean, 0.0)
        # Clamps keep what has no probability finite, so that 0 times it is 0. They would drop a
        # NaN, but then the normaliser is NaN too.
        x = tl.maximum(x - shift, -FAR)
        log2_p = x * (inverse_temperature * LOG2_E) - log2_total
        p = tl.exp2(log2_p)
        factor_of_p = l - c
        if entropy_coefficient is not None:
            factor_of_p -= h * (row_entropy + log2_p * LN_2)
        if kl_coefficient is not None:
            factor_of_p += b * (tl.minimum(x - y, FAR) * inverse_temperature - mean)
        grad = p * factor_of_p
        if log_prob_coefficient is not None:  # noqa: SIM102
            if (target >= first) & (target < first + BLOCK):
                grad += tl.where(columns == target, c, 0.0)
        if (banned >= first) & (banned < first + BLOCK):
            grad = tl.where(columns == banned, 0.0, grad)
        tl.store(place, grad.to(gradient.dtype.element_ty), mask=columns < VOCAB)
    else:
        zeros = tl.zeros((BLOCK,), gradient.dtype.element_ty)
        tl.store(place, zeros, mask=columns < VOCAB)


_LAUNCHER = Launcher(row_gradient_kernel)


def block_size(vocab_size: int) -> int:
    """Columns of a block: a power of two that depends on the vocabulary alone."""
    return min(MAX_BLOCK, max(256, 1 << (vocab_size - 1).bit_length()))


def row_gradient(
    logits: Tensor,
    normaliser: Normaliser,
    coefficients: Coefficients,
    temperature: float,
    banned_token: int | None,
    *,
    targets: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logits: Tensor | None = None,
    divergence: Divergence | None = None,
    step_ids: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Launcher: the gradient [N, V] of the loss, in the dtype of the logits unless ``out`` says.

    Args:
        logits: float32, float16 or bfloat16 [N, V].
        normaliser, entropy, ref_logits, divergence, targets: of the rows, as in the forward pass;
            those whose coefficient is None are not needed. Numbers are float32 and contiguous.
        step_ids: [N], the index into the coefficients of each row; None: its own.
        scale: one value that multiplies all coefficients: the incoming gradient, left on the
            device.
        out: where to write, consecutive columns; may be ``logits``.
    """
    if out is None:
        out = logits.new_empty(logits.shape)
    rows, vocab_size = logits.shape
    if rows == 0:
        return out
    logits = prepare_logits(logits, None)[0]
    if ref_logits is not None:
        ref_logits = prepare_logits(ref_logits, None)[0]
    device, block = logits.get_device(), block_size(vocab_size)
    form, out_form = layout(logits), layout(out)
    ref_form = None if ref_logits is None else layout(ref_logits)
    ref_maximum, mean_difference = divergence or (None, None)
    c, l, h, b = coefficients  # noqa: E741
    arguments = (
        out,
        logits,
        ref_logits,
        contiguous(targets),
        *normaliser,
        entropy,
        ref_maximum,
        mean_difference,
        contiguous(step_ids),
        contiguous(c),
        contiguous(l),
        contiguous(h),
        contiguous(b),
        scale,
        out.stride(0),
        logits.stride(0),
        0 if ref_logits is None else ref_logits.stride(0),
        0 if c is None else c.shape[0],
        1.0 / temperature,
        -1 if banned_token is None else banned_token,
        vocab_size,
        form.align,
        1 if ref_form is None else ref_form.align,
        out_form.align,
        block,
    )
    variant = (
        device,
        vocab_size,
        out_form,
        form,
        ref_form,
        dtype_of(targets),
        dtype_of(step_ids),
        entropy is None,
        divergence is None,
        c is None,
        l is None,
        h is None,
        b is None,
        scale is None,
    )
    with on_device_of(logits):
        _LAUNCHER(rows * -(-vocab_size // block), variant, arguments, OPTIONS)
    return out
