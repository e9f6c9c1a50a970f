"""Rows over one shard of a vocabulary in plain PyTorch, by chunks. Scores are tempered logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from egspo_kernels.reference import softmax
from egspo_kernels.reference.linear import (
    head_gradients,
    statistics_gradient,
    tempered_scores,
)
from egspo_kernels.shared.product import Settings, chunks
from egspo_kernels.shared.shards import Gradients, Operands, Partials, Whole, finite_or_zero


def shard_partials(operands: Operands, settings: Settings) -> tuple[Tensor, Tensor]:
    """The fields of :class:`Partials` as [7, N], and the argmax, all of this shard."""
    hidden, weight, bias, targets, ref_hidden, ref_weight = operands
    rows = hidden.shape[0]
    values = hidden.new_zeros(
        (len(Partials._fields), rows), dtype=softmax.accumulation_dtype(hidden.dtype)
    )
    argmax = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
    for chunk in chunks(rows, settings.chunk_rows):
        out = Partials(*values[:, chunk].unbind(0))
        scores = tempered_scores(hidden[chunk], weight, bias, settings)
        argmax[chunk] = scores.argmax(-1)
        out.maximum.copy_(scores.amax(-1))
        if targets is not None:
            column = targets[chunk]
            score = softmax.gather_last(scores, column.clamp(min=0))
            out.target_score.copy_(score.masked_fill(column < 0, 0.0))
        scores.sub_(finite_or_zero(out.maximum)[:, None])
        weights = scores.exp()
        out.total.copy_(weights.sum(-1))
        moment = (weights * scores.masked_fill(scores == float("-inf"), 0.0)).sum(-1)
        out.entropy.copy_(out.total.log() - moment / out.total)
        if ref_hidden is not None:
            assert ref_weight is not None
            ref_scores = tempered_scores(ref_hidden[chunk], ref_weight, bias, settings)
            out.ref_maximum.copy_(ref_scores.amax(-1))
            ref_scores.sub_(finite_or_zero(out.ref_maximum)[:, None])
            out.ref_total.copy_(ref_scores.exp().sum(-1))
            difference = scores.sub_(ref_scores).masked_fill_(weights == 0, 0.0)
            out.mean_difference.copy_(difference.mul_(weights).sum(-1) / out.total)
    return values, argmax


def shard_gradients(
    operands: Operands,
    whole: Whole,
    grads: Gradients,
    needed: Sequence[bool],
    settings: Settings,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (the part of this shard), weight and bias; None if not needed."""
    hidden, weight, bias, targets, ref_hidden, ref_weight = operands
    maximum, log_total, ref_maximum, mean_difference = (values[:, None] for values in whole[1:])

    def scores_gradient(chunk: slice) -> Tensor:
        scores = tempered_scores(hidden[chunk], weight, bias, settings)
        log_probs = scores.sub_(maximum[chunk]).sub_(log_total[chunk])
        probs = log_probs.exp()
        grad = statistics_gradient(log_probs, probs, whole.entropy, grads[:3], chunk)
        if grads.log_prob is not None and targets is not None:
            column = targets[chunk, None]
            scale = grads.log_prob[chunk, None] * (column >= 0)
            grad.scatter_add_(1, column.clamp(min=0), scale)
        if grads.kl is not None and ref_hidden is not None:
            assert ref_weight is not None
            ref_scores = tempered_scores(ref_hidden[chunk], ref_weight, bias, settings)
            ref_scores.sub_(finite_or_zero(ref_maximum[chunk]))
            difference = log_probs.add_(log_total[chunk]).sub_(ref_scores)
            difference.masked_fill_(probs == 0, 0.0).sub_(mean_difference[chunk])
            grad += difference.mul_(probs).mul_(grads.kl[chunk, None])
        return grad

    return head_gradients(hidden, weight, bias, needed, settings, scores_gradient)
