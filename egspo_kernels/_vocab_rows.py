"""Statistics of rows whose vocabulary is cut into shards, by the chain rules of entropy and KL.

With S_r the sum of exponentials of shard r, all shifted by one maximum, and P_r = S_r / sum S its
share of the probability,

    H  = sum_r P_r (H_r - log P_r),    a sum of terms of one sign, so that nothing cancels;
    KL = sum_r P_r E_r[x - y] - log(sum S / sum S_ref),

where H_r and E_r are taken inside the shard, and x and y are the shifted scores of policy and
reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from egspo_kernels import reference
from egspo_kernels._linear_product import Settings, chunks
from egspo_kernels._linear_reference import (
    head_gradients,
    statistics_gradient,
    tempered_scores,
)
from egspo_kernels._vocab_shards import Shard


class Partials(NamedTuple):
    """What a shard says of its rows: [N], or [R, N] once gathered. Scores are tempered logits."""

    maximum: Tensor
    """Largest score, -inf for a shard without a finite one."""
    total: Tensor
    """Sum of exponentials of the scores less ``maximum``."""
    entropy: Tensor
    target_score: Tensor
    """0 for a target of another shard."""
    mean_difference: Tensor
    """``E_r[x - y]``, each less its largest score of the shard; the last three for the KL alone."""
    ref_maximum: Tensor
    ref_total: Tensor


class Combined(NamedTuple):
    """Statistics over the whole vocabulary, [N], and what their gradients need."""

    logsumexp: Tensor
    entropy: Tensor
    log_prob: Tensor
    argmax: Tensor
    confidence: Tensor
    kl: Tensor
    maximum: Tensor
    log_total: Tensor
    ref_maximum: Tensor
    mean_difference: Tensor


def shard_rows(*args: Any) -> tuple[Any, ...]:
    """Arguments of ``_ShardRows.forward``; the first six fields of :class:`Combined`.

    ``log_prob`` is None without targets and ``kl`` without ``ref_hidden``.
    """
    return _ShardRows.apply(*args)  # type: ignore[no-untyped-call, no-any-return]


class _ShardRows(torch.autograd.Function):
    """Local partials, one exchange, and the same statistics on every rank."""

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
        shard: Shard,
    ) -> tuple[Tensor | None, ...]:
        local = None if targets is None else shard.local_targets(targets)
        partials, argmax = _partials(hidden, weight, bias, local, ref_hidden, ref_weight, settings)
        # [R, 7, N] to seven of [R, N].
        gathered = shard.gather(partials, "forward pass").unbind(1)
        places = shard.gather(argmax + shard.start, "forward pass")
        outputs = combine(Partials(*gathered), places, targets, shard.vocab_size)
        ctx.save_for_backward(
            hidden, weight, bias, local, ref_hidden, ref_weight, outputs.entropy, *outputs[6:]
        )
        ctx.settings, ctx.shard = settings, shard
        ctx.mark_non_differentiable(outputs.argmax, outputs.confidence)
        ctx.set_materialize_grads(False)
        return (
            *outputs[:2],
            None if targets is None else outputs.log_prob,
            *outputs[3:5],
            None if ref_hidden is None else outputs.kl,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "vocab_parallel_token_stats and vocab_parallel_stepwise_surrogate are "
                "differentiable once: create_graph=True is not supported"
            )
        hidden, weight, bias, targets, ref_hidden, ref_weight, entropy, *shifts = ctx.saved_tensors
        maximum, log_total, ref_maximum, mean_difference = (values[:, None] for values in shifts)
        settings: Settings = ctx.settings
        grad_log_prob, grad_kl = grads[2], grads[5]

        def scores_gradient(chunk: slice) -> Tensor:
            scores = tempered_scores(hidden[chunk], weight, bias, settings)
            log_probs = scores.sub_(maximum[chunk]).sub_(log_total[chunk])
            probs = log_probs.exp()
            grad = statistics_gradient(log_probs, probs, entropy, grads[:3], chunk)
            if grad_log_prob is not None:
                column = targets[chunk, None]
                scale = grad_log_prob[chunk, None] * (column >= 0)
                grad.scatter_add_(1, column.clamp(min=0), scale)
            if grad_kl is not None:
                ref_scores = tempered_scores(ref_hidden[chunk], ref_weight, bias, settings)
                ref_scores.sub_(_finite_or_zero(ref_maximum[chunk]))
                difference = log_probs.add_(log_total[chunk]).sub_(ref_scores)
                difference.masked_fill_(probs == 0, 0.0).sub_(mean_difference[chunk])
                grad += difference.mul_(probs).mul_(grad_kl[chunk, None])
            return grad

        needed = ctx.needs_input_grad[:3]
        grad_hidden, *others = head_gradients(
            hidden, weight, bias, needed, settings, scores_gradient
        )
        if grad_hidden is not None:
            grad_hidden = ctx.shard.sum_over_ranks(grad_hidden, "backward pass")
        return grad_hidden, *others, None, None, None, None, None


def _partials(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """The fields of :class:`Partials` as [7, N], and the argmax, all of this shard."""
    rows = hidden.shape[0]
    values = hidden.new_zeros(
        (len(Partials._fields), rows), dtype=reference.accumulation_dtype(hidden.dtype)
    )
    argmax = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
    for chunk in chunks(rows, settings.chunk_rows):
        out = Partials(*values[:, chunk].unbind(0))
        scores = tempered_scores(hidden[chunk], weight, bias, settings)
        argmax[chunk] = scores.argmax(-1)
        out.maximum.copy_(scores.amax(-1))
        if targets is not None:
            column = targets[chunk]
            score = reference.gather_last(scores, column.clamp(min=0))
            out.target_score.copy_(score.masked_fill(column < 0, 0.0))
        scores.sub_(_finite_or_zero(out.maximum)[:, None])
        weights = scores.exp()
        out.total.copy_(weights.sum(-1))
        moment = (weights * scores.masked_fill(scores == float("-inf"), 0.0)).sum(-1)
        out.entropy.copy_(out.total.log() - moment / out.total)
        if ref_hidden is not None:
            assert ref_weight is not None
            ref_scores = tempered_scores(ref_hidden[chunk], ref_weight, bias, settings)
            out.ref_maximum.copy_(ref_scores.amax(-1))
            ref_scores.sub_(_finite_or_zero(out.ref_maximum)[:, None])
            out.ref_total.copy_(ref_scores.exp().sum(-1))
            difference = scores.sub_(ref_scores).masked_fill_(weights == 0, 0.0)
            out.mean_difference.copy_(difference.mul_(weights).sum(-1) / out.total)
    return values, argmax


def combine(
    partials: Partials, argmax: Tensor, targets: Tensor | None, vocab_size: int
) -> Combined:
    """Statistics over all shards, from [R, N] of them.

    Args:
        argmax: int64 [R, N] token ids.
        targets: [N] token ids, or None; one that no shard holds gives NaN.
    """
    maximum, shift, weight = _weights(partials.maximum, partials.total)
    ref_maximum, ref_shift, ref_weight = _weights(partials.ref_maximum, partials.ref_total)
    total, ref_total = weight.sum(0), ref_weight.sum(0)
    share = weight / total
    # A shard without probability has no say, be its own entropy or difference a NaN.
    nothing = share == 0
    surprise = partials.entropy - share.log()
    difference = partials.mean_difference + shift - ref_shift
    mean_difference = (share * difference).masked_fill(nothing, 0.0).sum(0)
    log_total = total.log()
    log_prob = partials.target_score.sum(0) - maximum - log_total
    if targets is not None:
        known = (targets >= 0) & (targets < vocab_size)
        log_prob = torch.where(known, log_prob, float("nan"))
    # In a row of NaN no shard has the largest score: what is found must still be a token.
    largest = partials.maximum == maximum
    return Combined(
        logsumexp=torch.where(maximum.isinf(), maximum, maximum + log_total),
        entropy=(share * surprise).masked_fill(nothing, 0.0).sum(0),
        log_prob=log_prob,
        argmax=torch.where(largest, argmax, vocab_size - 1).amin(0),
        confidence=torch.where(total == 0, float("nan"), 1.0 / total),
        kl=mean_difference - (total / ref_total).log(),
        maximum=maximum,
        log_total=log_total,
        ref_maximum=ref_maximum,
        mean_difference=mean_difference,
    )


def _weights(maxima: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of [R, N]: the maximum [N], each shard's distance to it, and its sum moved to it."""
    maximum = maxima.amax(0)
    shift = _finite_or_zero(maxima) - _finite_or_zero(maximum)
    weight = (shift.exp() * totals).masked_fill(maxima == float("-inf"), 0.0)
    return maximum, shift, weight


def _finite_or_zero(maximum: Tensor) -> Tensor:
    """A shift that leaves rows of -inf at -inf, where ``-inf - -inf`` would be NaN."""
    return maximum.masked_fill(maximum == float("-inf"), 0.0)
