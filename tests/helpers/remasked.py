"""Objectives on completions that are masked again: a batch, and their formulas written plainly.

The model is a table of free logits (tests/helpers/toy.py), so that gradients are compared entry by
entry; the completions are chosen by hand and end early, late and never.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo.algorithm.batch import Batch, Groups, Samples
from egspo.algorithm.micro_batches import MicroBatches
from egspo.algorithm.objectives.registry import build_objective
from egspo.algorithm.objectives.remasked import (
    Canvases,
    RemaskedObjective,
    completion_tokens,
)
from egspo.config import TrainConfig
from egspo.engines.processes import Processes
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import PromptBatch, Trajectory, length_before
from tests.helpers.runs import config
from tests.helpers.toy import MASK, toy_denoiser

EOS, LENGTH, GROUP = 2, 4, 4
TOKENS = torch.tensor(
    [
        *([0, 1, 2, 2], [1, 1, 0, 1], [2, 2, 2, 2], [0, 0, 1, 2]),
        *([1, 0, 0, 0], [1, 2, 2, 2], [0, 1, 1, 2], [0, 0, 2, 2]),
    ]
)
REWARDS = torch.tensor([[1.0, 0.0, 0.25, 0.5], [0.0, 2.0, 0.5, -1.0]], dtype=torch.float64)
KLS = {"mean_field": "k3", "coupled": "k3", "sequence_elbo": "k2"}


def options(name: str, folder: Path, **algorithm: Any) -> TrainConfig:
    changes = {
        "objective": name,
        "stepwise": False,
        "ratio_temperature": "sampling",
        "clip_low": 0.1,
        "clip_high": 0.2,
        "num_iterations": 2,
        "kl": KLS.get(name, "k3"),
        "beta": 0.3 if name in KLS else 0.0,
    }
    generation = {"max_new_tokens": LENGTH, "steps": 4, "block_length": 2, "temperature": 0.7}
    return config(folder, {"generation": generation, "algorithm": {**changes, **algorithm}})


def samples(rewards: Tensor = REWARDS) -> Samples:
    count = len(TOKENS)
    trajectory = Trajectory(
        prompts=PromptBatch.from_lists([[0, 1, 0]] * 4 + [[1, 0]] * 4, 0),
        tokens=TOKENS,
        unmask_step=torch.arange(LENGTH).expand(count, -1).to(torch.int16),
        confidence=torch.ones(TOKENS.shape, dtype=torch.float64),
        token_entropy=torch.zeros(TOKENS.shape, dtype=torch.float64),
        entropy=torch.zeros(count, LENGTH, dtype=torch.float64),
        log_prob=torch.zeros(count, LENGTH, dtype=torch.float64),
        steps=torch.full((count,), LENGTH),
        lengths=length_before(TOKENS, EOS),
        mask_id=MASK,
    )
    groups = Groups([0, 1], GROUP, 100, range(count))
    return Samples(groups, trajectory, rewards, {}, rewards, {})


def built(config: TrainConfig, denoiser: Denoiser) -> RemaskedObjective:
    micro_batches = MicroBatches(5, None, config.generation, 0)
    objective = build_objective(config, denoiser, micro_batches, Processes(alone=True), 3.0)
    micro_batches.together = objective.canvases
    assert isinstance(objective, RemaskedObjective)
    return objective


class Scored:
    """A batch of an objective, and the tables of its three policies."""

    def __init__(self, config: TrainConfig, rewards: Tensor = REWARDS) -> None:
        self.config = config
        self.denoiser = toy_denoiser(LENGTH, seed=1)
        self.table = self.denoiser.model.table
        reference = toy_denoiser(LENGTH, seed=2).model
        if config.algorithm.beta:
            self.denoiser = Denoiser(
                self.denoiser.model, mask_id=MASK, eos_id=EOS, pad_id=0, reference=reference
            )
        self.tables = {"reference": reference.table.detach()}
        self.objective = built(config, self.denoiser)
        self.samples = samples(rewards)
        self.selection = self.objective.select(self.samples)
        self.tables["old"] = self.table.detach().clone()
        self.scores = self.objective.score(self.selection.states)
        self.batch = Batch(1, self.samples, self.selection, self.scores, None, None, 0, {})
        self.advantage = self.objective.advantages(self.batch, None)

    def move(self) -> None:
        """What an update would do, only that it is not."""
        with torch.no_grad():
            noise = torch.Generator().manual_seed(5)
            self.table += 0.5 * torch.randn(self.table.shape, generator=noise).double()

    def loss(self, update: int) -> Tensor:
        states, weight = self.selection.states, 1 / REWARDS.numel()
        parts = [
            self.objective.loss(states, index, self.scores, self.advantage, weight).loss
            for index in self.scores.groups[update]
        ]
        return torch.stack(parts).sum()

    def formula(self, update: int) -> Tensor:
        """The same loss, a completion at a time."""
        states, name = self.selection.states, self.config.algorithm.objective
        assert isinstance(states, Canvases)
        sequences = self.selection.sequence_of_states()
        total, tokens = torch.zeros((), dtype=torch.float64), completion_tokens(TOKENS, EOS)
        for sequence in range(len(TOKENS)):
            rows = [
                row
                for row, of in enumerate(sequences)
                if of == sequence and int(states.rank[row]) == update
            ]
            if not rows:
                continue
            length = int(tokens[sequence].sum())
            canvases = []
            for row in rows:
                canvas = states.trajectory.canvas(torch.tensor([row]), torch.tensor([0]))[0]
                hidden = [k for k in range(length) if canvas[k] == MASK]
                canvases.append((canvas, hidden))
            group = REWARDS[sequence // GROUP]
            gain = float(group[sequence % GROUP] - group.mean())
            one = Completion(self, sequence, canvases, length, gain, states.weight[rows].tolist())
            total = total + FORMULAS[name](one)
        mean_over_tokens = name in ("mean_field", "coupled", "sandwich")
        return total / (float(tokens.sum()) if mean_over_tokens else len(TOKENS))


class Completion:
    """One of them: its canvases with their masked tokens, n tokens, and its reward's advantage."""

    def __init__(
        self,
        scored: Scored,
        sequence: int,
        canvases: list[tuple[Tensor, list[int]]],
        length: int,
        gain: float,
        weights: list[float],
    ) -> None:
        self.scored, self.sequence, self.tokens = scored, sequence, TOKENS[sequence]
        self.canvases, self.length, self.gain, self.weights = canvases, length, gain, weights
        self.group = REWARDS[sequence // GROUP]
        self.algorithm = scored.config.algorithm

    def log_prob(self, canvas: Tensor, position: int, policy: str = "new") -> Tensor:
        table = self.scored.tables.get(policy, self.scored.table)
        place = sum(int(token) * (MASK + 1) ** k for k, token in enumerate(canvas))
        logits = table[place, position, :MASK] / self.scored.config.generation.temperature
        return logits.log_softmax(0)[self.tokens[position]]

    def clipped(self, ratio: Tensor) -> Tensor:
        low, high = 1 - self.algorithm.clip_low, 1 + self.algorithm.clip_high
        return torch.minimum(ratio * self.gain, ratio.clamp(low, high) * self.gain)


def grpo(one: Completion, estimate: Callable[[int, str], Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for k in range(one.length):
        new, old, reference = (estimate(k, policy) for policy in ("new", "old", "reference"))
        kl = (reference - new).exp() - (reference - new) - 1
        total = total - one.clipped((new - old).exp()) + one.algorithm.beta * kl
    return total


def mean_field(one: Completion) -> Tensor:
    ((canvas, hidden),) = one.canvases
    assert hidden == list(range(one.length)) and (canvas == MASK).all()
    return grpo(one, lambda k, policy: one.log_prob(canvas, k, policy))


def weighted(one: Completion) -> Tensor:
    ((canvas, _),) = one.canvases
    scale, member = one.algorithm.weight_scale, one.sequence % GROUP
    up = [math.exp(scale * float(r - one.group.mean())) for r in one.group]
    down = [math.exp(-scale * float(r - one.group.mean())) for r in one.group]
    weight = down[member] / sum(down) - up[member] / sum(up)
    log_prob = torch.stack([one.log_prob(canvas, k) for k in range(one.length)]).sum()
    return GROUP * weight * log_prob


def coupled(one: Completion) -> Tensor:
    (whole, every), (first, in_first), (second, in_second) = one.canvases
    assert every == sorted(in_first + in_second) == list(range(one.length))
    share = float(1 / (2 * one.weights[1]))
    assert 0.2 <= share <= 0.8 and one.weights[2] == pytest.approx(1 / (2 * (1 - share)))

    def estimate(k: int, policy: str) -> Tensor:
        alone = one.log_prob(whole, k, policy)
        if k in in_first:
            return (alone + one.log_prob(first, k, policy) / share) / 2
        return (alone + one.log_prob(second, k, policy) / (1 - share)) / 2

    return grpo(one, estimate)


def elbo(one: Completion, policy: str) -> Tensor:
    total, n = torch.zeros((), dtype=torch.float64), one.length
    assert n > 0
    pairs = list(zip(one.canvases[::2], one.canvases[1::2], strict=True))
    for (first, inside), (second, outside) in pairs:
        assert sorted(inside + outside) == list(range(n))
        for canvas, hidden in ((first, inside), (second, outside)):
            if hidden:
                log_probs = torch.stack([one.log_prob(canvas, k, policy) for k in hidden])
                total = total + (n + 1) / len(hidden) * log_probs.sum() / 2
    return total / len(pairs)


def sequence_elbo(one: Completion) -> Tensor:
    new, old, reference = (elbo(one, policy) for policy in ("new", "old", "reference"))
    kl = (new - reference) ** 2 / (2 * one.length)
    return -one.clipped(((new - old) / one.length).exp()) + one.algorithm.beta * kl


def sandwich(one: Completion) -> Tensor:
    canvases, n = one.canvases, one.length
    lower = torch.stack(
        [torch.stack([one.log_prob(c, k) for k in hidden]).mean() for c, hidden in canvases]
    ).mean()
    likelihood = lower
    if one.gain < 0:
        beta, omega = one.algorithm.bound_power, one.algorithm.bound_share
        terms = []
        for k in range(n):
            powers = [
                one.log_prob(c, k).exp() ** beta / (len(hidden) / n)
                for c, hidden in canvases
                if k in hidden
            ]
            if powers:
                terms.append((torch.stack(powers).sum() / len(canvases)).log())
        likelihood = omega * torch.stack(terms).mean() / beta + (1 - omega) * lower
    return -one.gain * n * likelihood


FORMULAS: dict[str, Callable[[Completion], Tensor]] = {
    "mean_field": mean_field,
    "weighted": weighted,
    "coupled": coupled,
    "sequence_elbo": sequence_elbo,
    "sandwich": sandwich,
}
