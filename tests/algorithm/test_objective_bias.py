"""How far from the policy gradient the likelihoods of other methods point, by enumeration.

Every trajectory of a small tabular policy, a token a step: the gradient of the expected reward is
known, and what a method puts in the place of the log-probability has an expectation over its masks.
Of several steps in one, by formulas of their own and not by the code that trains.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from egspo.config import GenerationConfig
from tests.helpers.toy import MASK, enumerate_trajectories, reward, toy_denoiser, with_policy

LENGTH = 3
DENOISER = toy_denoiser(LENGTH, seed=3)
TABLE = DENOISER.model.table
CONFIG = GenerationConfig(max_new_tokens=LENGTH, steps=LENGTH, block_length=LENGTH, temperature=1.0)
ROOT = Path(__file__).parents[2]

Likelihood = Callable[[list[int], list[int], float], Tensor]
"""Takes a completion, the step that revealed each token, and the advantage."""


def logits(tokens: list[int], masked: tuple[int, ...], k: int) -> Tensor:
    canvas = [MASK if j in masked else token for j, token in enumerate(tokens)]
    place = sum(token * (MASK + 1) ** j for j, token in enumerate(canvas))
    return TABLE[place, k, :MASK].log_softmax(0)


def log_prob(tokens: list[int], masked: tuple[int, ...], k: int) -> Tensor:
    return logits(tokens, masked, k)[tokens[k]]


def subsets(size: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(LENGTH), size))


EVERY = [masked for size in range(1, LENGTH + 1) for masked in subsets(size)]


def mean_field(tokens: list[int], when: list[int], advantage: float) -> Tensor:
    whole = tuple(range(LENGTH))
    return torch.stack([log_prob(tokens, whole, k) for k in whole]).sum()


def elbo(tokens: list[int], when: list[int], advantage: float) -> Tensor:
    """Exact: that of every method whose estimate of it is unbiased."""
    terms = [
        log_prob(tokens, masked, k) / len(masked) / math.comb(LENGTH, len(masked))
        for masked in EVERY
        for k in masked
    ]
    return torch.stack(terms).sum()


def coupled(tokens: list[int], when: list[int], advantage: float) -> Tensor:
    """Half the mean field, and half what the pair of masks has in expectation over its share t.

    Of a pair, each token is in one of the two. Both have the same expectation, as t and 1 - t are
    alike: a mask m has the probability t^|m| (1 - t)^(L - |m|), its tokens the weight 1 / t.
    """
    t = 0.2 + 0.6 * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    terms = [
        2
        * float((t ** (len(m) - 1) * (1 - t) ** (LENGTH - len(m))).mean())
        * log_prob(tokens, m, k)
        for m in EVERY
        for k in m
    ]
    return (mean_field(tokens, when, advantage) + torch.stack(terms).sum()) / 2


def sandwich(tokens: list[int], when: list[int], advantage: float) -> Tensor:
    """SPG's of two masks, each of a uniform number of tokens; beta 1.5, omega 0.5."""
    if advantage >= 0:
        return elbo(tokens, when, advantage)  # its lower bound, in expectation
    omega = 0.5
    return omega * upper_bound(tuple(tokens)) + (1 - omega) * elbo(tokens, when, advantage)


@functools.cache
def upper_bound(completion: tuple[int, ...]) -> Tensor:
    power, tokens = 1.5, list(completion)
    found = {m: {k: log_prob(tokens, m, k) for k in m} for m in EVERY}
    chance = {m: 1 / LENGTH / math.comb(LENGTH, len(m)) for m in EVERY}
    terms = []
    for pair in itertools.product(EVERY, EVERY):
        ever = sorted({*pair[0], *pair[1]})
        bounds = []
        for k in ever:
            powers = [(power * found[m][k]).exp() * LENGTH / len(m) for m in pair if k in m]
            bounds.append((torch.stack(powers).sum() / 2).log() / power)
        terms.append(chance[pair[0]] * chance[pair[1]] * torch.stack(bounds).mean())
    return LENGTH * torch.stack(terms).sum()


def steps_of(tokens: list[int], when: list[int]) -> list[tuple[Tensor, float]]:
    """Log-probability of each step, and the entropy before it; the first step first."""
    found = []
    for k in sorted(range(LENGTH), key=lambda k: when[k]):
        masked = tuple(j for j in range(LENGTH) if when[j] >= when[k])
        every = logits(tokens, masked, k)
        found.append((every[tokens[k]], -float((every.exp() * every).sum().detach())))
    return found


def stepwise(tokens: list[int], when: list[int], advantage: float) -> Tensor:
    """That of the trajectory, every step of it."""
    return torch.stack([value for value, _ in steps_of(tokens, when)]).sum()


def high_entropy(count: int) -> Likelihood:
    """Of the steps of largest entropy."""

    def likelihood(tokens: list[int], when: list[int], advantage: float) -> Tensor:
        order = sorted(steps_of(tokens, when), key=lambda step: -step[1])
        return torch.stack([value for value, _ in order[:count]]).sum()

    return likelihood


def sign_aware(count: int) -> Likelihood:
    """Of the least confident steps, or the most confident ones where the advantage is negative."""

    def likelihood(tokens: list[int], when: list[int], advantage: float) -> Tensor:
        order = sorted(
            (value for value, _ in steps_of(tokens, when)), key=lambda v: float(v.detach())
        )
        return torch.stack(order[:count] if advantage >= 0 else order[-count:]).sum()

    return likelihood


CASES: dict[str, tuple[Likelihood, float, float]] = {
    "`stepwise`, every step": (stepwise, 1.0, 1.0),
    "`stepwise`, 2 of 3 steps by entropy": (high_entropy(2), 0.62, 0.73),
    "`stepwise`, 1 of 3 steps by entropy": (high_entropy(1), 0.54, 0.55),
    "`stepwise`, 2 of 3 steps, `sign_aware`": (sign_aware(2), 0.91, 0.74),
    "`stepwise`, 1 of 3 steps, `sign_aware`": (sign_aware(1), 0.87, 0.57),
    "`mean_field`": (mean_field, 0.16, 0.40),
    "`coupled`": (coupled, 0.31, 0.72),
    "`sequence_elbo`": (elbo, 0.37, 0.80),
    "`sandwich`": (sandwich, 0.39, 0.81),
}
"""The cosine to the policy gradient, with ``max_prob`` and ``random``."""


def cosine(likelihood: Likelihood, policy: str) -> float:
    """Of the expected gradient of advantage times likelihood, to that of the expected reward."""
    every = enumerate_trajectories(DENOISER, with_policy(CONFIG, policy))
    probability, tokens = every.probability, every.trajectory.tokens
    rewards = reward(tokens)
    exact = torch.autograd.grad((probability * rewards).sum(), TABLE, retain_graph=True)[0]
    advantage = rewards - (probability.detach() * rewards).sum()
    each = zip(
        *(tokens.tolist(), every.trajectory.unmask_step.tolist(), advantage.tolist()), strict=True
    )
    values = torch.stack([likelihood(*one) for one in each])
    total = (probability.detach() * advantage * values).sum()
    found = torch.autograd.grad(total, TABLE, retain_graph=True)[0]
    return float((found * exact).sum() / (found.norm() * exact.norm()))


@pytest.mark.parametrize("name", CASES)
def test_only_all_steps_of_the_rollout_have_its_gradient(name: str) -> None:
    likelihood, *expected = CASES[name]
    found = [cosine(likelihood, policy) for policy in ("max_prob", "random")]
    assert found == pytest.approx(expected, abs=1e-12 if likelihood is stepwise else 0.005)
    row = f"| {name} | {expected[0]:.2f} | {expected[1]:.2f} |"
    assert row in (ROOT / "docs" / "methods.md").read_text("utf-8")
