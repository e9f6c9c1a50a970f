"""Statistics and surrogate straight from hidden states, within a stated workspace.

Logits are made a chunk of rows at a time and made again in the backward pass, so that the memory
they take depends on ``workspace_bytes`` and not on the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egspo_kernels import reference
from egspo_kernels._backend import Dispatcher, always_available
from egspo_kernels._checks import check_banned, check_index, check_matrix, check_temperature
from egspo_kernels.surrogate import (
    KL,
    Aggregation,
    Objective,
    aggregate_steps,
    check_reference,
    check_steps,
    step_objective,
)
from egspo_kernels.types import Surrogate, TokenStats

DEFAULT_WORKSPACE_BYTES = 256 * 2**20

# Vocabulary-sized rows alive at once in the backward pass with exact KL: the logits, both
# log-softmaxes, the probabilities, the gradient and one temporary.
_LIVE_ROWS = 6

_LINEAR_STATS = Dispatcher("linear_token_stats", {"reference": always_available})
_LINEAR_SURROGATE = Dispatcher("linear_stepwise_surrogate", {"reference": always_available})


class _Settings(NamedTuple):
    temperature: float
    banned_token: int | None
    chunk_rows: int


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
        settings: _Settings,
    ) -> tuple[Tensor | None, ...]:
        rows = hidden.shape[0]
        values = hidden.new_zeros((5, rows), dtype=reference.accumulation_dtype(hidden.dtype))
        logsumexp, entropy, log_prob, confidence, kl = values.unbind(0)
        argmax = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
        for chunk in _chunks(rows, settings.chunk_rows):
            scores = _scores(hidden[chunk], weight, bias, settings)
            log_probs = reference.log_softmax(scores)
            logsumexp[chunk] = scores.logsumexp(-1)
            entropy[chunk] = reference.entropy_of(log_probs)
            argmax[chunk] = scores.argmax(-1)
            confidence[chunk] = reference.gather_last(log_probs, argmax[chunk]).exp()
            if targets is not None:
                log_prob[chunk] = reference.gather_last(log_probs, targets[chunk])
            if ref_hidden is not None:
                assert ref_weight is not None
                ref_scores = _scores(ref_hidden[chunk], ref_weight, bias, settings)
                ref_log_probs = reference.log_softmax(ref_scores)
                kl[chunk] = (log_probs.exp() * _difference(log_probs, ref_log_probs)).sum(-1)
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
        settings: _Settings = ctx.settings
        grad_logsumexp, grad_entropy, grad_log_prob, _, _, grad_kl = grads
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        accumulation = reference.accumulation_dtype(weight.dtype)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulation) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulation) if needs_bias else None
        for chunk in _chunks(hidden.shape[0], settings.chunk_rows):
            log_probs = reference.log_softmax(_scores(hidden[chunk], weight, bias, settings))
            probs = log_probs.exp()
            # d(scores): softmax Jacobian of each output, collected in one buffer.
            grad = torch.zeros_like(probs)
            if grad_logsumexp is not None:
                grad += grad_logsumexp[chunk, None] * probs
            if grad_entropy is not None:
                finite = log_probs.masked_fill(log_probs == float("-inf"), 0.0)
                grad -= grad_entropy[chunk, None] * probs * (finite + entropy[chunk, None])
            if grad_log_prob is not None and targets is not None:
                scale = grad_log_prob[chunk, None]
                grad -= scale * probs
                grad.scatter_add_(1, targets[chunk, None].long(), scale)
            if grad_kl is not None and ref_hidden is not None:
                ref_scores = _scores(ref_hidden[chunk], ref_weight, bias, settings)
                ref_log_probs = reference.log_softmax(ref_scores)
                difference = _difference(log_probs, ref_log_probs)
                grad += grad_kl[chunk, None] * probs * (difference - kl[chunk, None])
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
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    banned_token: int | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    backend: str = "auto",
) -> TokenStats:
    """:func:`egspo_kernels.token_stats` of ``hidden @ weight.T + bias``, never held whole.

    ``logsumexp``, ``entropy`` and ``log_prob`` are differentiable, once, in ``hidden``, ``weight``
    and ``bias`` (computed only for those that require a gradient). Under autocast the product is
    taken in the autocast dtype, in the backward pass too.

    Args:
        hidden: floating point [N, D].
        weight: [V, D], the dtype of ``hidden`` outside autocast.
        targets: integer [N] in [0, V), or None.
        bias: [V] or None.
        temperature, banned_token, backend: as :func:`egspo_kernels.token_stats`.
        workspace_bytes: bound on the vocabulary-sized temporaries alive at once.

    Returns:
        :class:`TokenStats` of [N] tensors.

    Raises:
        ValueError: also when the workspace cannot hold one row, 24 bytes per vocabulary entry.
    """
    hidden, weight, bias = _check_linear(hidden, weight, bias, temperature, banned_token)
    if targets is not None:
        check_index("targets", targets, hidden.shape[0], hidden.device, weight.shape[0])
    settings = _settings(weight, temperature, banned_token, workspace_bytes)
    _LINEAR_STATS.choose(backend, hidden.device)
    outputs = _linear_rows(hidden, weight, bias, targets, None, None, settings)
    return TokenStats(*outputs[:5])


def linear_stepwise_surrogate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    step_ids: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    beta: float = 0.0,
    kl: KL | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    banned_token: int | None = None,
    aggregation: Aggregation = "sum",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    backend: str = "auto",
) -> Surrogate:
    """:func:`egspo_kernels.stepwise_surrogate` of ``hidden @ weight.T + bias``, never held whole.

    Args:
        hidden: floating point [N, D], one row per revealed token.
        weight: [V, D].
        ref_hidden: [N, D] hidden states of the reference policy; needed by ``kl="exact"``, and by
            ``kl="k3"`` unless ``ref_log_prob`` is given.
        ref_weight: [V, D] head of the reference policy; by default ``weight``, which must then be
            frozen. ``bias`` is shared, and must be frozen where a reference is used.
        workspace_bytes: bound on the vocabulary-sized temporaries alive at once.
        targets, step_ids, old_log_prob, advantage, clip_low, clip_high, beta, kl, ref_log_prob,
            weights, temperature, banned_token, aggregation, backend: as
            :func:`egspo_kernels.stepwise_surrogate`.

    Returns:
        :class:`Surrogate`; the loss is differentiable, once, in ``hidden``, ``weight``, ``bias``.
    """
    objective = Objective(clip_low, clip_high, beta, kl, aggregation)
    hidden, weight, bias = _check_linear(hidden, weight, bias, temperature, banned_token)
    rows, vocab_size = hidden.shape[0], weight.shape[0]
    check_index("targets", targets, rows, hidden.device, vocab_size)
    check_steps(rows, hidden.device, step_ids, old_log_prob, advantage, weights, ref_log_prob)
    if ref_hidden is not None:
        if ref_hidden.shape != hidden.shape:
            raise ValueError(
                f"ref_hidden must have the shape of hidden, {tuple(hidden.shape)}, "
                f"got {tuple(ref_hidden.shape)}"
            )
        ref_hidden = ref_hidden.detach().to(hidden.dtype)
        ref_weight = _check_ref_weight(weight, ref_weight, bias)
    check_reference(objective, "ref_hidden", ref_hidden, ref_log_prob)
    settings = _settings(weight, temperature, banned_token, workspace_bytes)
    _LINEAR_SURROGATE.choose(backend, hidden.device)

    if objective.kl == "k3" and ref_log_prob is None:
        assert ref_hidden is not None
        with torch.no_grad():
            ref_rows = _linear_rows(ref_hidden, ref_weight, bias, targets, None, None, settings)
            ref_log_prob = aggregate_steps(
                ref_rows[2], step_ids, old_log_prob.shape[0], aggregation
            )
    exact_rows = ref_hidden if objective.needs_exact_kl else None
    _, _, log_prob, _, _, token_kl = _linear_rows(
        hidden, weight, bias, targets, exact_rows, ref_weight, settings
    )
    return step_objective(
        objective, log_prob, step_ids, old_log_prob, advantage, weights, ref_log_prob, token_kl
    )


def _check_ref_weight(weight: Tensor, ref_weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The reference head, detached, in the dtype of the product."""
    if bias is not None and bias.requires_grad:
        raise ValueError("bias is shared with the reference policy: it must be frozen")
    if ref_weight is None:
        if weight.requires_grad:
            raise ValueError("weight is trained: the reference policy needs its own ref_weight")
        return weight
    if ref_weight.shape != weight.shape:
        raise ValueError(
            f"ref_weight must have the shape of weight, {tuple(weight.shape)}, "
            f"got {tuple(ref_weight.shape)}"
        )
    return ref_weight.detach().to(weight.dtype)


def _linear_rows(*args: Any) -> tuple[Any, ...]:
    return _LinearRows.apply(*args)  # type: ignore[no-untyped-call, no-any-return]


def _chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, rows))


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
    # Autocast was resolved by the caller; it is off here so that the backward pass, which runs
    # outside the caller's autocast region, repeats exactly this product.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden, weight, bias)
    return reference.tempered(logits, settings.temperature, settings.banned_token)


def _difference(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """``log p - log p_ref``, 0 where p is 0."""
    return (log_probs - ref_log_probs).masked_fill(log_probs == float("-inf"), 0.0)


def _settings(
    weight: Tensor, temperature: float, banned_token: int | None, workspace_bytes: int
) -> _Settings:
    element = torch.finfo(reference.accumulation_dtype(weight.dtype)).bits // 8
    row_bytes = _LIVE_ROWS * element * weight.shape[0]
    if workspace_bytes < row_bytes:
        raise ValueError(
            f"workspace_bytes must hold one row of logits and its temporaries, {row_bytes} bytes "
            f"for a vocabulary of {weight.shape[0]}, got {workspace_bytes}"
        )
    return _Settings(temperature, banned_token, workspace_bytes // row_bytes)


def _check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    banned_token: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks, and the three operands in the dtype of the product."""
    check_matrix("hidden", hidden)
    check_matrix("weight", weight)
    check_temperature(temperature)
    if weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must have shape (V > 0, {hidden.shape[1]}) to match hidden, "
            f"got {tuple(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, hidden on {hidden.device}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_banned(banned_token, weight.shape[0])
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif weight.dtype != hidden.dtype:
        raise TypeError(f"weight must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}")
    return hidden, weight, bias
