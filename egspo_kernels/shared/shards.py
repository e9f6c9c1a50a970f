"""Statistics of rows whose vocabulary is cut into shards, by the chain rules of entropy and KL.

With S_r the sum of exponentials of shard r, all shifted by one maximum, and P_r = S_r / sum S its
share of the probability,

    H  = sum_r P_r (H_r - log P_r),    a sum of terms of one sign, so that nothing cancels;
    KL = sum_r P_r E_r[x - y] - log(sum S / sum S_ref),

where H_r and E_r are taken inside the shard, and x and y are the shifted scores of policy and
reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """Of the product of this rank, for policy and reference."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor | None
    """int64 [N] rows of the shard, -1 for those of another one."""
    ref_hidden: Tensor | None
    """None where no KL is wanted."""
    ref_weight: Tensor | None


class Partials(NamedTuple):
    """What a shard says of its rows: [N], or [R, N] once gathered.

    Scores are logits, or already tempered, as the backend has them.
    """

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


class Whole(NamedTuple):
    """What gradients need to know of each row over the whole vocabulary, [N]."""

    entropy: Tensor
    maximum: Tensor
    log_total: Tensor
    ref_maximum: Tensor
    mean_difference: Tensor
    """``E[x - y]``, each less its largest score, at the temperature."""


class Gradients(NamedTuple):
    """Gradient of the loss with respect to each statistic, [N]; None where it has no part in it."""

    logsumexp: Tensor | None
    entropy: Tensor | None
    log_prob: Tensor | None
    kl: Tensor | None


class Combined(NamedTuple):
    """Statistics over the whole vocabulary, [N]."""

    logsumexp: Tensor
    entropy: Tensor
    log_prob: Tensor
    argmax: Tensor
    confidence: Tensor
    kl: Tensor
    whole: Whole


def combine(
    partials: Partials, argmax: Tensor, targets: Tensor | None, vocab_size: int, scale: float
) -> Combined:
    """Statistics over all shards, from [R, N] of them.

    Args:
        argmax: int64 [R, N] token ids.
        targets: [N] token ids, or None; one that no shard holds gives NaN.
        scale: what turns differences of scores into those of tempered logits.
    """
    maximum, shift, weight = _weights(partials.maximum, partials.total, scale)
    ref_maximum, ref_shift, ref_weight = _weights(partials.ref_maximum, partials.ref_total, scale)
    total, ref_total = weight.sum(0), ref_weight.sum(0)
    share = weight / total
    # A shard without probability has no say, be its own entropy or difference a NaN.
    nothing = share == 0
    surprise = partials.entropy - share.log()
    difference = partials.mean_difference + shift - ref_shift
    mean_difference = (share * difference).masked_fill(nothing, 0.0).sum(0)
    log_total = total.log()
    log_prob = (partials.target_score.sum(0) - maximum) * scale - log_total
    if targets is not None:
        known = (targets >= 0) & (targets < vocab_size)
        log_prob = torch.where(known, log_prob, float("nan"))
    # In a row of NaN no shard has the largest score: what is found must still be a token.
    largest = partials.maximum == maximum
    entropy = (share * surprise).masked_fill(nothing, 0.0).sum(0)
    return Combined(
        logsumexp=torch.where(maximum.isinf(), maximum, maximum * scale + log_total),
        entropy=entropy,
        log_prob=log_prob,
        argmax=torch.where(largest, argmax, vocab_size - 1).amin(0),
        confidence=torch.where(total == 0, float("nan"), 1.0 / total),
        kl=mean_difference - (total / ref_total).log(),
        whole=Whole(entropy, maximum, log_total, ref_maximum, mean_difference),
    )


def _weights(maxima: Tensor, totals: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of [R, N]: the maximum [N], each shard's distance to it, and its sum moved to it."""
    maximum = maxima.amax(0)
    shift = (finite_or_zero(maxima) - finite_or_zero(maximum)) * scale
    weight = (shift.exp() * totals).masked_fill(maxima == float("-inf"), 0.0)
    return maximum, shift, weight


def finite_or_zero(maximum: Tensor) -> Tensor:
    """A shift that leaves rows of -inf at -inf, where ``-inf - -inf`` would be NaN."""
    return maximum.masked_fill(maximum == float("-inf"), 0.0)
