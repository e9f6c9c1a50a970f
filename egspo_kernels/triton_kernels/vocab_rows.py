"""Rows over one shard of a vocabulary, by the kernels for whole ones. Scores are logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from egspo_kernels.shared.product import Settings, chunks
from egspo_kernels.shared.shards import Gradients, Operands, Partials, Whole
from egspo_kernels.triton_kernels import normaliser
from egspo_kernels.triton_kernels import rows as row_kernels
from egspo_kernels.triton_kernels.kl import Divergence, exact_kl
from egspo_kernels.triton_kernels.linear import Head, chunk_logits, head_gradients, logits_buffer
from egspo_kernels.triton_kernels.normaliser import Normaliser
from egspo_kernels.triton_kernels.row_gradient import Coefficients, row_gradient


def shard_partials(operands: Operands, settings: Settings) -> tuple[Tensor, Tensor]:
    """The fields of :class:`Partials` as float32 [7, N], and the argmax, all of this shard.

    With a reference what is wanted is the KL: entropy and argmax are left at 0.
    """
    head, ref_head, targets = Head(*operands[:3]), _ref_head(operands), operands.targets
    rows = head.hidden.shape[0]
    values = head.hidden.new_zeros((len(Partials._fields), rows), dtype=torch.float32)
    argmax = torch.zeros(rows, dtype=torch.int64, device=head.hidden.device)
    buffer = logits_buffer(head, settings)
    ref_buffer = None if ref_head is None else torch.empty_like(buffer)
    for chunk in chunks(rows, settings.chunk_rows):
        logits = chunk_logits(head, settings, chunk, buffer)
        out = values[:, chunk]
        if ref_head is None or ref_buffer is None:
            out[:3], argmax[chunk] = _statistics(logits, settings)
        else:
            ref_logits = chunk_logits(ref_head, settings, chunk, ref_buffer)
            out[0], out[1], out[4:] = _divergence(logits, ref_logits, settings)
        if targets is not None:
            out[3] = _target_scores(logits, targets[chunk], settings)
    return values, argmax


def _ref_head(operands: Operands) -> Head | None:
    if operands.ref_hidden is None or operands.ref_weight is None:
        return None
    return Head(operands.ref_hidden, operands.ref_weight, operands.bias)


def _statistics(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Maximum, sum of exponentials and entropy as [3, n], and the argmax."""
    stats = row_kernels.token_stats(logits, None, None, settings.temperature, settings.banned_token)
    maximum = logits.gather(1, stats.argmax[:, None])[:, 0].float()
    # Without a finite logit the banned token may be what was found.
    maximum = torch.where(stats.logsumexp == float("-inf"), float("-inf"), maximum)
    return torch.stack([maximum, 1.0 / stats.confidence, stats.entropy]), stats.argmax


def _divergence(
    logits: Tensor, ref_logits: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum and sum of exponentials, and as [3, n] the last three of ``Partials``.

    The reference is read a second time for its own sum: that in the KL is lost where it is
    infinite.
    """
    scalars = (settings.temperature, settings.banned_token)
    nowhere = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    _, _, policy, divergence = exact_kl(logits, ref_logits, nowhere, *scalars)
    _, reference = normaliser.log_probs(ref_logits, nowhere, *scalars)
    last = [divergence.mean_difference, reference.maximum, reference.log_total.exp()]
    return policy.maximum, policy.log_total.exp(), torch.stack(last)


def _target_scores(logits: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    scores = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()
    if settings.banned_token is not None:
        scores = scores.masked_fill(targets == settings.banned_token, float("-inf"))
    return scores.masked_fill(targets < 0, 0.0)


def shard_gradients(
    operands: Operands,
    whole: Whole,
    grads: Gradients,
    needed: Sequence[bool],
    settings: Settings,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden (the part of this shard), weight and bias; None if not needed."""
    head, targets = Head(*operands[:3]), operands.targets
    ref_head = None if grads.kl is None else _ref_head(operands)
    ref_buffer = None if ref_head is None else logits_buffer(ref_head, settings)

    def logits_gradient(chunk: slice, logits: Tensor, out: Tensor) -> None:
        ref_logits = None
        if ref_head is not None and ref_buffer is not None:
            ref_logits = chunk_logits(ref_head, settings, chunk, ref_buffer)
        logsumexp, entropy, log_prob, kl = (None if g is None else g[chunk] for g in grads)
        row_gradient(
            logits,
            Normaliser(whole.maximum[chunk], whole.log_total[chunk]),
            Coefficients(log_prob, logsumexp, entropy, kl),
            settings.temperature,
            settings.banned_token,
            targets=None if targets is None else targets[chunk],
            entropy=whole.entropy[chunk],
            ref_logits=ref_logits,
            divergence=Divergence(whole.ref_maximum[chunk], whole.mean_difference[chunk]),
            out=out,
        )

    gradients = head_gradients(head, needed, settings, logits_gradient)
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True))
