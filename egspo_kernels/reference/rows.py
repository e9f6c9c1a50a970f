"""Statistics and samples of rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo_kernels.reference.sampling import draw
from egspo_kernels.reference.softmax import entropy_of, gather_last, log_softmax, tempered
from egspo_kernels.types import SampledTokens, TokenStats


def token_stats(
    logits: Tensor, targets: Tensor | None, temperature: float, banned_token: int | None
) -> TokenStats:
    scores = tempered(logits, temperature, banned_token)
    log_probs = log_softmax(scores)
    argmax = scores.argmax(-1)
    return TokenStats(
        logsumexp=scores.logsumexp(-1),
        entropy=entropy_of(log_probs),
        log_prob=None if targets is None else gather_last(log_probs, targets),
        argmax=argmax,
        confidence=gather_last(log_probs, argmax).exp(),
    )


def sample_tokens(
    logits: Tensor,
    temperature: float,
    seed: int,
    step: int,
    row_ids: Tensor,
    banned_token: int | None,
    entropy_temperature: float,
) -> SampledTokens:
    scores = tempered(logits, 1.0, banned_token)
    log_probs = log_softmax(scores)
    if temperature == 0:
        token = scores.argmax(-1)
        log_prob = torch.zeros_like(log_probs[:, 0])
    else:
        # The maximum comes off before anything else: noise beside a large score loses its bits.
        shifted = scores - scores.amax(-1, keepdim=True)
        weights = (shifted / temperature).exp()
        token = draw(weights, seed, step, row_ids)
        log_prob = gather_last(shifted, token) / temperature - weights.sum(-1).log()
    entropy_log_probs = (
        log_probs
        if entropy_temperature == 1.0
        else log_softmax(tempered(logits, entropy_temperature, banned_token))
    )
    return SampledTokens(
        token, log_prob, gather_last(log_probs, token).exp(), entropy_of(entropy_log_probs)
    )
