"""When positions are unmasked: the schedule of steps over blocks, and the order inside a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from egspo_kernels import SampledTokens, counter_uniform, token_stats

# Keeps the noise that orders positions apart from the noise that samples tokens.
_ORDER_STREAM = 0x6F72646572


class Step(NamedTuple):
    """One denoising step: ``quota`` positions of the block [start, end) are revealed."""

    start: int
    end: int
    masked: int
    """Positions of the block still masked before the step."""
    quota: int


def schedule(length: int, steps: int, block_length: int) -> list[Step]:
    """Semi-autoregressive schedule: ``steps`` split evenly over the blocks, left to right.

    In a block of ``m`` masks and ``n`` steps every step reveals ``m // n`` positions, the first
    ``m % n`` steps one more. Raises ValueError where that cannot be.
    """
    if min(length, steps, block_length) <= 0:
        raise ValueError(
            f"length, steps and block_length must be > 0, got {length}, {steps}, {block_length}"
        )
    if length % block_length:
        raise ValueError(f"length {length} is not a multiple of block_length {block_length}")
    blocks = length // block_length
    if steps % blocks or steps // blocks > block_length:
        raise ValueError(
            f"steps ({steps}) must be a multiple of the {blocks} blocks, with at most "
            f"{block_length} steps each"
        )
    per_block = steps // blocks
    plan = []
    for block in range(blocks):
        masked = block_length
        for step in range(per_block):
            quota = block_length // per_block + (step < block_length % per_block)
            plan.append(Step(block * block_length, (block + 1) * block_length, masked, quota))
            masked -= quota
    return plan


class Candidates(NamedTuple):
    """What a policy may look at: N masked positions of the active blocks of a batch."""

    logits: Tensor
    """[N, V]."""
    sample: SampledTokens
    """[N]."""
    row_ids: Tensor
    """int64 [N], identity of each position, the key of its noise."""
    seed: int
    step: int
    banned_token: int


@dataclass(frozen=True)
class UnmaskingPolicy:
    """An order of unmasking: the highest scores are revealed first, ties to the left."""

    name: str
    exact: bool
    """Whether positions are chosen before tokens are sampled, so that the product of token
    probabilities is the exact transition probability and not a surrogate of it."""
    score: Callable[[Candidates], Tensor]
    """Scores [N]; those of ``threshold`` decoding are in [0, 1]."""
    bounded: bool = False
    """Whether scores are losses, and a threshold bounds the sum of those that a step takes on."""

    def above(self, scores: Tensor, threshold: float) -> Tensor:
        """int64 [R], how many of the best of [R, W] scores a threshold lets through.

        Positions that are known have the score -inf.
        """
        if not self.bounded:
            return (scores >= threshold).sum(1)
        losses = -scores.sort(dim=1, descending=True).values
        return (losses.cumsum(1) < threshold).sum(1)


def _sampled_confidence(candidates: Candidates) -> Tensor:
    return candidates.sample.confidence


def _random(candidates: Candidates) -> Tensor:
    seed = candidates.seed ^ _ORDER_STREAM
    return counter_uniform(seed, candidates.step, candidates.row_ids, 1)[:, 0]


def _max_prob(candidates: Candidates) -> Tensor:
    return token_stats(candidates.logits, None, banned_token=candidates.banned_token).confidence


def _margin(candidates: Candidates) -> Tensor:
    """Probability of the best token less that of the second best, without a copy of the logits."""
    stats = token_stats(candidates.logits, None, banned_token=candidates.banned_token)
    values, tokens = candidates.logits.topk(min(3, candidates.logits.shape[1]), dim=1)
    values = values.to(stats.logsumexp.dtype)
    values = values.masked_fill(tokens == candidates.banned_token, float("-inf"))
    probs = (values - stats.logsumexp[:, None]).exp().sort(dim=1, descending=True).values
    return probs[:, 0] - probs[:, 1] if probs.shape[1] > 1 else probs[:, 0]


def _low_entropy(candidates: Candidates) -> Tensor:
    return -token_stats(candidates.logits, None, banned_token=candidates.banned_token).entropy


def _leftmost(candidates: Candidates) -> Tensor:
    """Nobody before anybody: ties go to the left."""
    return torch.zeros_like(candidates.sample.confidence)


POLICIES = {
    policy.name: policy
    for policy in (
        UnmaskingPolicy("low_confidence", False, _sampled_confidence),
        UnmaskingPolicy("random", True, _random),
        UnmaskingPolicy("max_prob", True, _max_prob),
        UnmaskingPolicy("margin", True, _margin),
        UnmaskingPolicy("entropy", True, _low_entropy),
        UnmaskingPolicy("entropy_bounded", True, _low_entropy, bounded=True),
        UnmaskingPolicy("left_to_right", True, _leftmost),
    )
}


def unmasking_policy(name: str) -> UnmaskingPolicy:
    """The policy of that name; raises ValueError with the names there are."""
    if name not in POLICIES:
        raise ValueError(f"unknown unmasking policy {name!r}; choose from {sorted(POLICIES)}")
    return POLICIES[name]
