"""From token statistics to the loss, and to the coefficient of each step in the gradient.

One small kernel does what :func:`egspo_kernels.shared.objective.step_objective` does, derivative
included: it sums the tokens of each step in a fixed order, without atomics, whatever the order of
``step_ids``. Nothing in it grows with the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from egspo_kernels.shared.objective import LOG_RATIO_LIMIT, Objective, Steps
from egspo_kernels.triton_kernels.launch import (
    OPTIONS,
    Launcher,
    contiguous,
    dtype_of,
    on_device_of,
)
from egspo_kernels.types import Surrogate

BLOCK_STEPS = 16
BLOCK_TOKENS = 128
SCAN_TOKENS = 1024
BLOCK_TERMS = 1024
_OPTIONS = OPTIONS | {"num_warps": 4}


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def add_token_values(totals, values, tokens, present, member):
    """Adds the value of each token to the step it belongs to; float32 [steps, tokens] totals."""
    value = tl.load(values + tokens, mask=present, other=0.0)
    return totals + tl.where(member, value[None, :], 0.0)


@triton.jit
def token_range(step_ids, first, last, num_tokens, num_steps, SCAN_TOKENS: tl.constexpr):
    """Where the tokens of some steps begin and end, and how many tokens' steps do not exist.

    The ids are read once, several loads under way at a time, in whatever order they are: a table of
    the steps' ranges would take a launch of its own.
    """
    begins = tl.full((SCAN_TOKENS,), 0x7FFFFFFF, tl.int32)
    ends = tl.zeros((SCAN_TOKENS,), tl.int32)
    strays = tl.zeros((SCAN_TOKENS,), tl.int32)
    for start in tl.range(0, num_tokens, SCAN_TOKENS, loop_unroll_factor=2):
        tokens = start + tl.arange(0, SCAN_TOKENS)
        exists = tokens < num_tokens
        ids = tl.load(step_ids + tokens, mask=exists, other=0)
        strays += (exists & ((ids < 0) | (ids >= num_steps))).to(tl.int32)
        near = exists & (ids >= first) & (ids < last)
        begins = tl.minimum(begins, tl.where(near, tokens, 0x7FFFFFFF))
        ends = tl.maximum(ends, tl.where(near, tokens + 1, 0))
    return tl.min(begins, 0), tl.max(ends, 0), tl.sum(strays, 0)


@triton.jit
def sum_tokens(
    token_log_prob,
    token_reference,
    step_ids,
    first,
    num_tokens,
    num_steps,
    BLOCK_STEPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SCAN_TOKENS: tl.constexpr,
):
    """Sums of both values over the tokens of some steps, the number of these, and strays."""
    steps = first + tl.arange(0, BLOCK_STEPS)
    begin, end, strays = token_range(
        step_ids, first, first + BLOCK_STEPS, num_tokens, num_steps, SCAN_TOKENS
    )
    log_probs = tl.zeros((BLOCK_STEPS, BLOCK_TOKENS), tl.float32)
    references = tl.zeros((BLOCK_STEPS, BLOCK_TOKENS), tl.float32)
    counts = tl.zeros((BLOCK_STEPS, BLOCK_TOKENS), tl.int32)
    # From a multiple: the order of a sum does not depend on the steps beside it.
    for start in range(begin // BLOCK_TOKENS * BLOCK_TOKENS, end, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        present = tokens < num_tokens
        step = tl.load(step_ids + tokens, mask=present, other=0)
        member = (steps[:, None] == step[None, :]) & present[None, :]
        counts += member.to(tl.int32)
        log_probs = add_token_values(log_probs, token_log_prob, tokens, present, member)
        if token_reference is not None:
            references = add_token_values(references, token_reference, tokens, present, member)
    return tl.sum(log_probs, 1), tl.sum(references, 1), tl.sum(counts, 1), strays


@triton.jit(
    do_not_specialize=["num_tokens", "num_steps"],
    do_not_specialize_on_alignment=[
        "token_log_prob",
        "token_reference",
        "step_ids",
        "old_log_prob",
        "advantage",
        "weights",
        "ref_log_prob",
    ],
)
def step_kernel(
    token_log_prob,
    token_reference,
    step_ids,
    old_log_prob,
    advantage,
    weights,
    ref_log_prob,
    log_prob_out,
    ratio_out,
    kl_out,
    clipped_low_out,
    clipped_high_out,
    clamped_out,
    terms_out,
    coefficient_out,
    kl_coefficient_out,
    num_tokens: tl.int32,
    num_steps: tl.int32,
    low,
    high,
    beta,
    uniform_weight,
    limit,
    KL: tl.constexpr,
    AGGREGATION: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SCAN_TOKENS: tl.constexpr,
):
    """A few steps: their outputs, their terms of the loss, their tokens' coefficients.

    ``token_reference`` holds the tokens' log-probabilities under the reference policy (k3 without
    ``ref_log_prob``) or their KL (exact).
    """
    first = tl.program_id(0) * BLOCK_STEPS
    steps = first + tl.arange(0, BLOCK_STEPS)
    inside = steps < num_steps
    log_prob, reference, tokens, strays = sum_tokens(
        token_log_prob,
        token_reference,
        step_ids,
        first,
        num_tokens,
        num_steps,
        BLOCK_STEPS,
        BLOCK_TOKENS,
        SCAN_TOKENS,
    )
    count = tl.maximum(tokens, 1).to(tl.float32)
    if AGGREGATION == "mean":
        log_prob /= count
        reference /= count

    a = tl.load(advantage + steps, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(old_log_prob + steps, mask=inside, other=0.0).to(tl.float32)
    log_ratio = log_prob - old
    clamped = tl.abs(log_ratio) > limit
    ratio = tl.exp(clamp(log_ratio, -limit, limit))
    plain, clipped = ratio * a, clamp(ratio, low, high) * a
    loss = -tl.where(plain < clipped, plain, clipped)
    # The clipped branch is flat. A NaN compares false, and makes the gradient NaN as well.
    flat = ((ratio < low) | (ratio > high)) & (plain >= clipped)
    slope = tl.where(flat | clamped, 0.0, -plain)
    clamps = clamped.to(tl.int32)

    kl = tl.zeros((BLOCK_STEPS,), tl.float32)
    kl_share = tl.zeros((BLOCK_STEPS,), tl.float32)
    if KL == "k3":
        if ref_log_prob is not None:
            reference = tl.load(ref_log_prob + steps, mask=inside, other=0.0).to(tl.float32)
        difference = reference - log_prob
        ref_clamped = tl.abs(difference) > limit
        bounded = clamp(difference, -limit, limit)
        ref_ratio = tl.exp(bounded)
        kl = ref_ratio - bounded - 1
        slope -= tl.where(ref_clamped | (beta == 0), 0.0, beta * (ref_ratio - 1))
        clamps += ref_clamped.to(tl.int32)
    if KL == "exact":
        kl = reference
        kl_share += beta
    loss += tl.where(beta == 0, 0.0, beta * kl)

    weight = tl.zeros((BLOCK_STEPS,), tl.float32) + uniform_weight
    if weights is not None:
        weight = tl.load(weights + steps, mask=inside, other=0.0).to(tl.float32)
    term = weight * loss
    share = weight
    if AGGREGATION == "sum":
        term = weight * (loss / count)
    if AGGREGATION != "exact":
        share = weight / count
    # A token whose step does not exist, unchecked on a GPU, must not vanish silently.
    term = tl.where(strays > 0, float("nan"), term)

    tl.store(log_prob_out + steps, log_prob, mask=inside)
    tl.store(ratio_out + steps, ratio, mask=inside)
    tl.store(kl_out + steps, kl, mask=inside)
    tl.store(clipped_low_out + steps, (ratio < low) & (a < 0), mask=inside)
    tl.store(clipped_high_out + steps, (ratio > high) & (a > 0), mask=inside)
    tl.store(clamped_out + steps, clamps, mask=inside)
    tl.store(terms_out + steps, term, mask=inside)
    tl.store(coefficient_out + steps, share * slope, mask=inside)
    tl.store(kl_coefficient_out + steps, share * kl_share, mask=inside)


@triton.jit(do_not_specialize=["num_steps"])
def total_kernel(terms, clamped, loss_out, clamped_out, num_steps: tl.int32, BLOCK: tl.constexpr):
    """The sum over steps, by one program in a fixed order."""
    losses = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, num_steps, BLOCK):
        steps = start + tl.arange(0, BLOCK)
        losses += tl.load(terms + steps, mask=steps < num_steps, other=0.0)
        counts += tl.load(clamped + steps, mask=steps < num_steps, other=0)
    tl.store(loss_out, tl.sum(losses, 0))
    tl.store(clamped_out, tl.sum(counts, 0))


_STEPS = Launcher(step_kernel)
_TOTAL = Launcher(total_kernel)


def step_objective(
    objective: Objective, token_log_prob: Tensor, token_reference: Tensor | None, steps: Steps
) -> tuple[Surrogate, Tensor, Tensor]:
    """Launcher: the surrogate of S steps, and two vectors for the gradient.

    They are float32 [S]: the derivative of the loss with respect to the log-probability, and the
    KL, of a token of each step.

    Args:
        token_log_prob: float32 [N].
        token_reference: float32 [N]: per-token KL for ``kl="exact"``, reference log-probability
            for ``kl="k3"`` without ``ref_log_prob``, else None.
        steps: ids int64 or int32 [N], one out of range, unchecked on a GPU, makes the loss NaN;
            the others [S] of any floating-point dtype.
    """
    given = tuple(map(contiguous, (token_reference, *steps)))
    num_steps, num_tokens = steps.old_log_prob.shape[0], token_log_prob.shape[0]
    log_prob = token_log_prob.new_empty(num_steps)
    ratio, kl, terms, coefficient, kl_coefficient = (torch.empty_like(log_prob) for _ in range(5))
    clipped_low = log_prob.new_empty(num_steps, dtype=torch.bool)
    clipped_high = torch.empty_like(clipped_low)
    clamped = log_prob.new_empty(num_steps, dtype=torch.int32)
    loss, total_clamped = log_prob.new_empty(()), log_prob.new_empty((), dtype=torch.int64)
    device = token_log_prob.get_device()
    with on_device_of(token_log_prob):
        if num_steps:
            arguments = (
                token_log_prob,
                *given,
                log_prob,
                ratio,
                kl,
                clipped_low,
                clipped_high,
                clamped,
                terms,
                coefficient,
                kl_coefficient,
                num_tokens,
                num_steps,
                1.0 - objective.clip_low,
                1.0 + objective.clip_high,
                float(objective.beta),
                1.0 / num_steps,
                LOG_RATIO_LIMIT,
                objective.kl,
                objective.aggregation,
                BLOCK_STEPS,
                BLOCK_TOKENS,
                SCAN_TOKENS,
            )
            variant = (device, objective.kl, objective.aggregation, *map(dtype_of, given))
            _STEPS(-(-num_steps // BLOCK_STEPS), variant, arguments, _OPTIONS)
        totals = (terms, clamped, loss, total_clamped, num_steps, BLOCK_TERMS)
        _TOTAL(1, device, totals, _OPTIONS)
    surrogate = Surrogate(loss, log_prob, ratio, kl, clipped_low, clipped_high, total_clamped)
    return surrogate, coefficient, kl_coefficient
