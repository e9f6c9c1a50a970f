"""What the public functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of one softmax per row, all [N]; float32 (float64 for float64 logits)."""

    logsumexp: Tensor
    """Log of the normaliser of ``logits / temperature``."""
    entropy: Tensor
    """Softmax entropy, in nats."""
    log_prob: Tensor | None
    """Log-probability of the target token; None without targets."""
    argmax: Tensor
    """int64, the most probable token, the lowest id among ties."""
    confidence: Tensor
    """Probability of ``argmax``."""


class SampledTokens(NamedTuple):
    """One sampled token per row, all [N]."""

    token: Tensor
    """int64."""
    log_prob: Tensor
    """Log-probability of ``token`` at the sampling temperature; 0 where that is 0 (greedy)."""
    confidence: Tensor
    """Probability of ``token`` at temperature 1."""
    entropy: Tensor
    """Softmax entropy at ``entropy_temperature``, in nats."""


class Surrogate(NamedTuple):
    """The clipped stepwise surrogate and what to log about it."""

    loss: Tensor
    """Scalar, differentiable: the weighted sum over steps."""
    log_prob: Tensor
    """[S] step log-probability, detached."""
    ratio: Tensor
    """[S] probability ratio to the behaviour policy, detached."""
    kl: Tensor
    """[S] KL estimate to the reference policy (zeros without one), detached."""
    clipped_low: Tensor
    """bool [S]: the lower clip is active (ratio below it, negative advantage)."""
    clipped_high: Tensor
    """bool [S]: the upper clip is active (ratio above it, positive advantage)."""
    clamped: Tensor
    """int64 scalar: log-ratios (policy or reference) clamped to +-20 before ``exp``."""
