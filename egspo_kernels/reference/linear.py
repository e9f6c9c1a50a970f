"""Reference statistics of rows of logits that are made a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from egspo_kernels.reference import softmax
from egspo_kernels.shared.product import Settings, chunks, product

LIVE_ROWS = 6
"""Vocabulary-sized rows alive at once in the backward pass with exact KL: the logits, both
log-softmaxes, the probabilities, the gradient and one temporary."""


def linear_rows(*args: Any) -> tuple[Any, ...]:
    """Arguments of ``_LinearRows.forward``: per-row statistics, the last of them the KL."""
    return _LinearRows.apply(*args)  # type: ignore[no-untyped-call, no-any-return]


class _LinearRows(torch.autograd.Function):
    """(hidden, weight, bias, targets, ref_hidden) to per-row statistics, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor | None, ...]:
        rows = hidden.shape[0]
        values = hidden.new_zeros((5, rows), dtype=softmax.accumulation_dtype(hidden.dtype))
        logsumexp, entropy, log_prob, confidence, kl = values.unbind(0)
        argmax = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
        for chunk in chunks(rows, settings.chunk_rows):
            scores = tempered_scores(hidden[chunk], weight, bias, settings)
            log_probs = softmax.log_softmax(scores)
            logsumexp[chunk] = scores.logsumexp(-1)
            entropy[chunk] = softmax.entropy_of(log_probs)
            argmax[chunk] = scores.argmax(-1)
            confidence[chunk] = softmax.gather_last(log_probs, argmax[chunk]).exp()
            if targets is not None:
                log_prob[chunk] = softmax.gather_last(log_probs, targets[chunk])
            if ref_hidden is not None:
                assert ref_weight is not None
                ref_scores = tempered_scores(ref_hidden[chunk], ref_weight, bias, settings)
                ref_log_probs = softmax.log_softmax(ref_scores)
                kl[chunk] = softmax.kl_of(log_probs, ref_log_probs)
        ctx.save_for_backward(hidden, weight, bias, targets, ref_hidden, ref_weight, entropy, kl)
        ctx.settings = settings
        ctx.mark_non_differentiable(argmax, confidence)
        return (
            logsumexp,
            entropy,
            log_prob if targets is not None else None,
            argmax,
            confidence,
            kl if ref_hidden is not None else None,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_token_stats and linear_stepwise_surrogate are differentiable once: "
                "create_graph=True is not supported"
            )
        hidden, weight, bias, targets, ref_hidden, ref_weight, entropy, kl = ctx.saved_tensors
        settings: Settings = ctx.settings
        _, _, grad_log_prob, _, _, grad_kl = grads

        def scores_gradient(chunk: slice) -> Tensor:
            log_probs = softmax.log_softmax(tempered_scores(hidden[chunk], weight, bias, settings))
            probs = log_probs.exp()
            grad = statistics_gradient(log_probs, probs, entropy, grads[:3], chunk)
            if grad_log_prob is not None and targets is not None:
                grad.scatter_add_(1, targets[chunk, None].long(), grad_log_prob[chunk, None])
            if grad_kl is not None and ref_hidden is not None:
                ref_scores = tempered_scores(ref_hidden[chunk], ref_weight, bias, settings)
                ref_log_probs = softmax.log_softmax(ref_scores)
                difference = softmax.difference_of(probs, log_probs, ref_log_probs)
                grad += grad_kl[chunk, None] * probs * (difference - kl[chunk, None])
            return grad

        needed = ctx.needs_input_grad[:3]
        gradients = head_gradients(hidden, weight, bias, needed, settings, scores_gradient)
        return *gradients, None, None, None, None


def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needed: Sequence[bool],
    settings: Settings,
    scores_gradient: Callable[[slice], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, None for one that is not needed.

    Args:
        scores_gradient: called with a chunk of rows; the gradient of their scores, which may be
            overwritten.
    """
    accumulation = softmax.accumulation_dtype(weight.dtype)
    grad_hidden = torch.zeros_like(hidden) if needed[0] else None
    grad_weight = torch.zeros_like(weight, dtype=accumulation) if needed[1] else None
    grad_bias = (
        torch.zeros_like(bias, dtype=accumulation) if bias is not None and needed[2] else None
    )
    for chunk in chunks(hidden.shape[0], settings.chunk_rows):
        grad = scores_gradient(chunk)
        if settings.banned_token is not None:
            grad[:, settings.banned_token] = 0.0
        grad = (grad / settings.temperature).to(weight.dtype)
        if grad_hidden is not None:
            grad_hidden[chunk] = grad @ weight
        if grad_weight is not None:
            grad_weight += grad.t() @ hidden[chunk]
        if grad_bias is not None:
            grad_bias += grad.sum(0)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(weight.dtype),
    )


def statistics_gradient(
    log_probs: Tensor,
    probs: Tensor,
    entropy: Tensor,
    grads: Sequence[Tensor | None],
    chunk: slice,
) -> Tensor:
    """Gradient of the statistics of a chunk of rows with respect to its scores, in one buffer.

    What a log-probability adds at its own target is left to the caller.

    Args:
        entropy: of all rows.
        grads: of log-sum-exp, entropy and log-probability of all rows, or None.
    """
    grad_logsumexp, grad_entropy, grad_log_prob = grads
    grad = torch.zeros_like(probs)
    if grad_logsumexp is not None:
        grad += grad_logsumexp[chunk, None] * probs
    if grad_entropy is not None:
        finite = log_probs.masked_fill(log_probs == float("-inf"), 0.0)
        grad -= grad_entropy[chunk, None] * probs * (finite + entropy[chunk, None])
    if grad_log_prob is not None:
        grad -= grad_log_prob[chunk, None] * probs
    return grad


def tempered_scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings
) -> Tensor:
    """Logits of some rows at the temperature, the banned token at -inf."""
    logits = product(hidden, weight, bias, settings.logits_dtype)
    return softmax.tempered(logits, settings.temperature, settings.banned_token)
