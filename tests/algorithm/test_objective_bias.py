"""How far from the policy gradient the likelihoods of other methods point, by enumeration.

Every trajectory of a small tabular policy, a token a step: the gradient of the expected reward is
known, and what a method puts in the place of the log-probability has an expectation over its masks.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from egspo.config import GenerationConfig
from tests.helpers.toy import MASK, enumerate_trajectories, reward, toy_denoiser, with_policy

LENGTH = 3
DENOISER = toy_denoiser(LENGTH, seed=3)
TABLE = DENOISER.model.table
CONFIG = GenerationConfig(max_new_tokens=LENGTH, steps=LENGTH, block_length=LENGTH, temperature=1.0)


def log_prob(tokens: list[int], masked: tuple[int, ...], k: int) -> Tensor:
    canvas = [MASK if j in masked else token for j, token in enumerate(tokens)]
    place = sum(token * (MASK + 1) ** j for j, token in enumerate(canvas))
    return TABLE[place, k, :MASK].log_softmax(0)[tokens[k]]


def subsets(size: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(LENGTH), size))


def mean_field(tokens: list[int], when: list[int]) -> Tensor:
    whole = tuple(range(LENGTH))
    return torch.stack([log_prob(tokens, whole, k) for k in whole]).sum()


def elbo(tokens: list[int], when: list[int]) -> Tensor:
    terms = [
        log_prob(tokens, masked, k) / size / math.comb(LENGTH, size)
        for size in range(1, LENGTH + 1)
        for masked in subsets(size)
        for k in masked
    ]
    return torch.stack(terms).sum()


def stepwise(tokens: list[int], when: list[int]) -> Tensor:
    """That of the trajectory, every step of it."""
    terms = []
    for k in range(LENGTH):
        masked = tuple(j for j in range(LENGTH) if when[j] >= when[k])
        terms.append(log_prob(tokens, masked, k))
    return torch.stack(terms).sum()


@pytest.mark.parametrize("policy", ["max_prob", "random"])
def test_only_the_steps_of_the_rollout_have_its_gradient(policy: str) -> None:
    every = enumerate_trajectories(DENOISER, with_policy(CONFIG, policy))
    probability, tokens = every.probability, every.trajectory.tokens
    rewards = reward(tokens)
    exact = torch.autograd.grad((probability * rewards).sum(), TABLE, retain_graph=True)[0]
    weight = probability.detach() * (rewards - (probability.detach() * rewards).sum())

    def angle(likelihood: object) -> float:
        pairs = zip(tokens.tolist(), every.trajectory.unmask_step.tolist(), strict=True)
        values = torch.stack([likelihood(one, when) for one, when in pairs])  # type: ignore[operator]
        found = torch.autograd.grad((weight * values).sum(), TABLE)[0]
        cosine = (found * exact).sum() / (found.norm() * exact.norm())
        return 1 - float(cosine)

    assert angle(stepwise) < 1e-12
    for biased in (mean_field, elbo):
        assert 0.1 < angle(biased) < 1  # ascends, in another direction
