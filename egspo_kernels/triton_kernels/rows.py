"""Softmax statistics of rows of logits in one pass, and the device functions other kernels share.

A block of a row is summarised by its largest logit ``m`` and, in units of the temperature,
``s = sum e^(x-m)`` and ``t = sum e^(x-m) (x-m)``: the entropy is then ``log s - t/s``, a sum of
terms of one sign, where the unshifted form cancels. Logits that do not exist (beyond the
vocabulary, or banned) are -inf.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from egspo_kernels.types import TokenStats

MAX_BLOCK = 4096
"""Columns of a block, unless the vocabulary is smaller: 16 in the registers of each of 256 threads,
and few enough that several programs share a processor and hide each other's loads."""
STATISTICS_BLOCK = 8192
"""For the statistics, which need few registers more than the logits, and whose reductions across
threads would cost as much as the rest in smaller blocks."""
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}
"""Launch options of kernels that read blocks of logits."""


LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def row_pointer(logits, row, row_stride, ALIGN: tl.constexpr):
    """Pointer to the start of a row, whose stride is a multiple of ``ALIGN`` elements."""
    return logits + tl.multiple_of(row.to(tl.int64) * row_stride, ALIGN)


@triton.jit
def locate_row(rows, n, row_count, VOCAB: tl.constexpr):
    """Row of output ``n`` and how many columns may be read: none, if it is out of range."""
    row = n.to(tl.int64) if rows is None else tl.load(rows + n).to(tl.int64)
    return row, tl.where((row >= 0) & (row < row_count), VOCAB, 0)


@triton.jit
def load_logits(start, columns, width, banned):
    """float32 logits of some columns of the row at ``start``; -inf beyond ``width``.

    The banned token is dropped after the load: in the mask it would forbid wide loads.
    """
    logits = tl.load(start + columns, mask=columns < width, other=float("-inf"))
    return tl.where(columns == banned, float("-inf"), logits.to(tl.float32))


@triton.jit
def load_block(start, first, width, banned, BLOCK: tl.constexpr):
    """float32 logits of the block whose first column is ``first``; only its block drops a token."""
    columns = first + tl.arange(0, BLOCK)
    logits = tl.load(start + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    if (banned >= first) & (banned < first + BLOCK):
        logits = tl.where(columns == banned, float("-inf"), logits)
    return logits


@triton.jit
def finite_or_zero(maximum):
    """A shift that leaves rows of -inf at -inf, where ``-inf - -inf`` would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def first_column(selected, columns):
    """The lowest of the selected columns, or the largest int32."""
    return tl.min(tl.where(selected, columns, 0x7FFFFFFF), 0)


@triton.jit
def power_terms(exponent):
    """``2^d`` and ``2^d d``; both 0 for -inf, and NaN stays NaN.

    Powers of two are what the hardware has. At -200 they are 0 already, without ``-inf * 0``.
    """
    exponent = tl.maximum(exponent, -200.0, propagate_nan=tl.PropagateNan.ALL)
    weight = tl.exp2(exponent)
    return weight, weight * exponent


@triton.constexpr_function
def group_size(logits):
    """Columns of a wide load: a thread holds them, so a maximum over them costs no exchange."""
    return 128 // logits.dtype.element_ty.primitive_bitwidth


@triton.jit
def normaliser_terms(shifted):
    """``e^d`` and ``e^d d`` for ``d = (x - max) / temperature``; 0 for -inf, NaN stays NaN."""
    weight, moment = power_terms(shifted * LOG2_E)
    return weight, moment * LN_2


@triton.jit
def row_partials(partials, n, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The blocks of row ``n``: their numbers, which of them exist, and where each left its first
    partial (the next ones are ``programs`` further, each)."""
    blocks: tl.constexpr = triton.cdiv(VOCAB, BLOCK)
    block = tl.arange(0, triton.next_power_of_2(blocks))
    return block, block < blocks, partials + n.to(tl.int64) * blocks + block


@triton.jit
def merge_blocks(maxima, sums, moments, inverse_temperature):
    """``m``, ``s`` and ``t`` of a row from those of its blocks.

    Args:
        maxima, sums, moments: float32 [blocks]; a block that does not exist is (-inf, 0, 0).
    """
    maximum = tl.max(maxima, 0)
    shift = (maxima - finite_or_zero(maximum)) * inverse_temperature
    scale = tl.exp(shift)
    moved = tl.where(shift > float("-inf"), scale * (moments + shift * sums), 0.0)
    return maximum, tl.sum(scale * sums, 0), tl.sum(moved, 0)


@triton.jit(do_not_specialize=["row_count", "row_stride", "banned", "programs"])
def block_statistics_kernel(
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
    BLOCK: tl.constexpr,
):
    """(m, s, t, place) of one block of one row into float32 ``partials`` [4, N * blocks].

    ``place`` is the first group of columns with a logit of ``m``, counted from the start of the
    block: finding the column itself would take a sixth of this kernel's instructions.
    """
    program = tl.program_id(0)
    blocks: tl.constexpr = triton.cdiv(VOCAB, BLOCK)
    row, width = locate_row(rows, program // blocks, row_count, VOCAB)
    start = row_pointer(logits, row, row_stride, ALIGN)
    x = load_block(start, program % blocks * BLOCK, width, banned, BLOCK)
    groups: tl.constexpr = BLOCK // group_size(logits)
    group_maxima = tl.max(tl.reshape(x, (groups, BLOCK // groups)), 1)
    maximum = tl.max(group_maxima, 0)
    scale = inverse_temperature * LOG2_E
    weight, moment = power_terms((x - finite_or_zero(maximum)) * scale)
    place = first_column(group_maxima == maximum, tl.arange(0, groups))
    tl.store(partials + program, maximum)
    tl.store(partials + programs + program, tl.sum(weight, 0))
    tl.store(partials + 2 * programs + program, tl.sum(moment, 0) * LN_2)
    tl.store(partials + 3 * programs + program, place.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["row_count", "row_stride", "banned", "programs"])
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
    BLOCK: tl.constexpr,
):
    """Combines the blocks of one row and writes its statistics."""
    n = tl.program_id(0)
    block, inside, source = row_partials(partials, n, VOCAB, BLOCK)
    maxima = tl.load(source, mask=inside, other=float("-inf"))
    sums = tl.load(source + programs, mask=inside, other=0.0)
    moments = tl.load(source + 2 * programs, mask=inside, other=0.0)
    places = tl.load(source + 3 * programs, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    maximum, total, moment = merge_blocks(maxima, sums, moments, inverse_temperature)
    log_total = tl.log(total)
    tl.store(logsumexp_out + n, maximum * inverse_temperature + log_total)
    tl.store(entropy_out + n, log_total - moment / total)
    tl.store(confidence_out + n, tl.where(total == 0, float("nan"), 1.0 / total))
    row, width = locate_row(rows, n, row_count, VOCAB)
    start = logits + row * row_stride
    # A row of NaN has no largest logit: what is found must still be a column.
    size: tl.constexpr = group_size(logits)
    places += block * (BLOCK // size)
    group = tl.minimum(first_column(inside & (maxima == maximum), places), (VOCAB - 1) // size)
    columns = group * size + tl.arange(0, size)
    x = load_logits(start, columns, width, banned)
    argmax = tl.minimum(first_column(x == maximum, columns), VOCAB - 1)
    tl.store(argmax_out + n, argmax.to(tl.int64))
    if targets is not None:
        target = tl.load(targets + n).to(tl.int64)
        valid = (target >= 0) & (target < width)
        x = tl.load(start + target, mask=valid, other=float("nan"))
        x = tl.where(valid & (target == banned), float("-inf"), x.to(tl.float32))
        tl.store(log_prob_out + n, (x - maximum) * inverse_temperature - log_total)


def block_size(vocab_size: int, limit: int = MAX_BLOCK) -> int:
    """Columns of a block: a power of two that depends on the vocabulary alone."""
    power: int = triton.next_power_of_2(vocab_size)
    return min(limit, max(256, power))


def block_count(vocab_size: int, limit: int = MAX_BLOCK) -> int:
    """Blocks of a row."""
    return -(-vocab_size // block_size(vocab_size, limit))


def prepare_logits(logits: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same rows with consecutive columns: a copy of the rows used if they are not already."""
    if logits.stride(1) == 1 or logits.shape[1] == 1:
        return logits, None if rows is None else rows.contiguous()
    return (logits if rows is None else logits[rows.long()]).contiguous(), None


def alignment(logits: Tensor) -> int:
    """The power of two, at most 16, that divides the row stride in elements.

    A constant of the compiled kernel: with it loads are as wide as the stride allows, and the
    stride itself need not be constant.
    """
    return math.gcd(logits.stride(0), 16)


def statistics_arguments(
    logits: Tensor, programs: int, temperature: float, banned_token: int | None
) -> dict[str, Any]:
    """What all kernels over rows cut into blocks of ``STATISTICS_BLOCK`` take."""
    return {
        "row_stride": logits.stride(0),
        "programs": programs,
        "inverse_temperature": 1.0 / temperature,
        "banned": -1 if banned_token is None else banned_token,
        "VOCAB": logits.shape[1],
        "BLOCK": block_size(logits.shape[1], STATISTICS_BLOCK),
    }


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device current: Triton launches there."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.accelerator.device_index(tensor.device.index)


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
    programs = count * block_count(logits.shape[1], STATISTICS_BLOCK)
    partials = logits.new_empty((4, programs), dtype=torch.float32)
    logsumexp, entropy, confidence = (
        logits.new_empty(count, dtype=torch.float32) for _ in range(3)
    )
    log_prob = None if targets is None else logits.new_empty(count, dtype=torch.float32)
    argmax = logits.new_empty(count, dtype=torch.int64)
    stats = TokenStats(logsumexp, entropy, log_prob, argmax, confidence)
    if count == 0:
        return stats
    scalars = statistics_arguments(logits, programs, temperature, banned_token)
    scalars["row_count"] = logits.shape[0]
    with on_device_of(logits):
        block_statistics_kernel[(programs,)](
            logits, rows, partials, **scalars, ALIGN=alignment(logits), **OPTIONS
        )
        row_statistics_kernel[(count,)](
            logits,
            rows,
            None if targets is None else targets.contiguous(),
            partials,
            *stats,
            **scalars,
            **(OPTIONS | {"num_warps": 1}),
        )
    return stats
