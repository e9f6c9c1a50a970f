"""Objectives on completions that are masked again, by their formulas written plainly in float64.

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
    smallest,
)
from egspo.config import REMASKED, TrainConfig
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
        self.batch = Batch(1, self.samples, self.selection, self.scores, None, 0, {})
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


@pytest.mark.parametrize("name", REMASKED)
def test_loss_and_gradient_are_those_of_the_formula(name: str, tmp_path: Path) -> None:
    scored = Scored(options(name, tmp_path))
    scored.move()
    for update in (0, 1):
        mine, plain = scored.loss(update), scored.formula(update)
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
        found, expected = (torch.autograd.grad(loss, scored.table)[0] for loss in (mine, plain))
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(KLS))
def test_the_first_ratio_is_one(name: str, tmp_path: Path) -> None:
    scored = Scored(options(name, tmp_path))
    states = scored.selection.states
    for update in (0, 1):  # each under masks of its own
        for index in scored.scores.groups[update]:
            outcome = scored.objective.loss(states, index, scored.scores, scored.advantage, 1.0)
            assert (outcome.ratio == 1).all()
            assert torch.equal(outcome.log_prob, scored.scores.recorded[index])
    once = Scored(options(name, tmp_path, num_iterations=1, beta=0.0))
    assert once.scores.old_log_prob is None  # then it is that of the update's own pass
    outcome = once.objective.loss(
        once.selection.states, once.scores.groups[0][0], once.scores, once.advantage, 1.0
    )
    assert (outcome.ratio == 1).all()


@pytest.mark.parametrize("name", REMASKED)
def test_a_micro_batch_parts_no_completion_and_changes_no_gradient(
    name: str, tmp_path: Path
) -> None:
    scored = Scored(options(name, tmp_path))
    gradients = []
    for size in (1, 1000):
        scored.objective.micro_batches.size = size
        scores = scored.objective.score(scored.selection.states)
        for group in scores.groups:
            assert all(len(index) % scored.objective.canvases == 0 for index in group)
        scored.scores = scores
        gradients.append(torch.autograd.grad(scored.loss(0), scored.table)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", REMASKED)
def test_masks_are_a_function_of_seed_update_and_sequence(name: str, tmp_path: Path) -> None:
    objective = built(options(name, tmp_path), toy_denoiser(LENGTH))
    tokens = completion_tokens(TOKENS.repeat(1, 4), EOS) | True
    ids, shown = torch.arange(8), torch.ones(8, 30, dtype=torch.bool)
    masks = objective.masks(shown, tokens, ids, 3)
    padded = torch.cat([torch.zeros(8, 5, dtype=torch.bool), shown], dim=1)
    some = objective.masks(padded[2:4], tokens[2:4], ids[2:4], 3)
    assert torch.equal(some.hidden, masks.hidden[2:4])
    assert torch.equal(some.prompt[..., 5:], masks.prompt[2:4]) and not some.prompt[..., :5].any()
    other = objective.masks(shown, tokens, ids, 4)
    assert not torch.equal(torch.cat(other[:2], dim=2), torch.cat(masks[:2], dim=2))


@pytest.mark.parametrize("name", ["mean_field", "weighted", "sandwich"])
def test_prompts_are_masked_at_their_rate(name: str, tmp_path: Path) -> None:
    objective = built(options(name, tmp_path), toy_denoiser(LENGTH))
    shown = torch.ones(400, 100, dtype=torch.bool)
    tokens = torch.ones(400, LENGTH, dtype=torch.bool)
    masks = objective.masks(shown, tokens, torch.arange(400), 0).prompt
    # 40,000 tokens at least: a standard deviation of 0.0018.
    assert float(masks.double().mean()) == pytest.approx(0.15, abs=0.01)


def test_the_elbo_estimate_is_unbiased(tmp_path: Path) -> None:
    """Its mean over all masks is the ELBO of its definition, in which every order counts alike."""
    torch.manual_seed(0)
    n, value = 4, torch.rand(16, 4, dtype=torch.float64)  # by the set that is masked, and the token
    sets = [[k for k in range(n) if code >> k & 1] for code in range(16)]
    by_size = {size: [s for s in sets if len(s) == size] for size in range(n + 1)}

    def total(masked: list[int]) -> float:
        return float(value[sum(1 << k for k in masked), masked].sum())

    exact = 0.0
    for size in range(1, n + 1):
        mean = sum(map(total, by_size[size])) / len(by_size[size])
        exact += mean * n / size / n
    objective = built(options("sequence_elbo", tmp_path, mask_samples=1), toy_denoiser(n))
    tokens = torch.ones(20000, n, dtype=torch.bool)
    masks = objective.masks(torch.ones(20000, 2, dtype=torch.bool), tokens, torch.arange(20000), 0)
    sizes = masks.scored[:, 0].sum(1)
    expected = torch.zeros((), dtype=torch.float64)
    for size in range(n + 1):
        found = masks.weight[sizes == size]
        share = float((sizes == size).double().mean())
        assert share == pytest.approx(1 / (n + 1), abs=0.015)  # five standard deviations
        first, second = (
            sum(map(total, by_size[count])) / len(by_size[count]) for count in (size, n - size)
        )
        assert (found == found[0]).all()
        expected += (found[0, 0] * first + found[0, 1] * second) / (n + 1)
    assert float(expected) == pytest.approx(exact, rel=1e-12)
    # And every set of a size is as likely as any other.
    codes = (masks.scored[:, 0] * (1 << torch.arange(n))).sum(1).bincount(minlength=16)
    for size, chosen in by_size.items():
        counts = codes[[sum(1 << k for k in s) for s in chosen]].double()
        assert float(counts.max() - counts.min()) < 6 * float(counts.mean()) ** 0.5, size


def test_sandwiched_blocks_are_masked_as_the_rollout_decodes(tmp_path: Path) -> None:
    objective = built(options("sandwich", tmp_path, prompt_masking=0.0), toy_denoiser(LENGTH))
    tokens = torch.arange(8) < torch.tensor([8, 5, 1]).repeat(200)[:, None]
    shown = torch.ones(600, 2, dtype=torch.bool)
    hidden = objective.masks(shown, tokens, torch.arange(600), 0).hidden[:, 0]
    firsts = set()
    for row, n in zip(hidden.tolist(), tokens.sum(1).tolist(), strict=True):
        first = row.index(True) // 2  # the block that is masked in part
        firsts.add((n, first))
        assert first * 2 < n and all(row[first * 2 + 2 :]) and all(row[n:])
    assert firsts == {(8, b) for b in range(4)} | {(5, b) for b in range(3)} | {(1, 0)}


def test_the_upper_bound_is_above_the_lower_one(tmp_path: Path) -> None:
    """By Jensen, for every beta >= 1, were all masks of all sizes averaged."""
    denoiser = toy_denoiser(3, seed=4)
    table = denoiser.model.table.detach()[..., :MASK].log_softmax(-1)
    tokens = (0, 1, 1)
    masked_sets = [[k for k in range(3) if code >> k & 1] for code in range(1, 8)]

    def log_prob(masked: list[int], k: int) -> float:
        canvas = [MASK if j in masked else t for j, t in enumerate(tokens)]
        return float(table[sum(t * (MASK + 1) ** j for j, t in enumerate(canvas)), k, tokens[k]])

    def weight(masked: list[int]) -> float:
        return 1 / 3 / math.comb(3, len(masked))

    lower = sum(weight(m) * 3 / len(m) * log_prob(m, k) for m in masked_sets for k in m)
    for beta in (1.0, 1.5, 2.0):
        upper = 0.0
        for k in range(3):
            mean = sum(
                weight(m) * 3 / len(m) * math.exp(beta * log_prob(m, k))
                for m in masked_sets
                if k in m
            )
            upper += math.log(mean) / beta
        assert upper > lower


def test_what_has_no_reward_or_teaches_nothing_is_left_out(tmp_path: Path) -> None:
    rewards = REWARDS.clone()
    rewards[0, 1], rewards[1] = float("nan"), 0.5
    for name in REMASKED:
        scored = Scored(options(name, tmp_path, beta=0.0), rewards)
        assert set(scored.selection.sequences) == {0, 2, 3}, name
        assert scored.selection.skipped_groups == 1
        assert float(scored.advantage[:: scored.objective.canvases].sum()) == pytest.approx(0.0)


def test_weights_are_softmaxes_over_the_members_with_a_reward(tmp_path: Path) -> None:
    objective = built(options("weighted", tmp_path, weight_scale=2.0), toy_denoiser(LENGTH))
    rewards = torch.tensor([[1.0, float("nan"), 0.0, 0.0], [3.0] * 4], dtype=torch.float64)
    up = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    expected = 4 * (up.softmax(0) - (-up).softmax(0))
    found = objective.completion_advantages(rewards)
    torch.testing.assert_close(found[0, [0, 2, 3]], expected)
    assert found[0, 1] == 0 and (found[1] == 0).all()
    assert (objective.completion_advantages(rewards * float("nan")) == 0).all()


def test_smallest_takes_as_many_of_the_allowed_as_asked_for() -> None:
    noise = torch.tensor([[0.3, 0.1, 0.2, 0.0], [0.5, 0.5, 0.5, 0.5]])
    allowed = torch.tensor([[True, True, True, False], [False, True, True, True]])
    found = smallest(noise, allowed, torch.tensor([2, 2]))
    assert found.tolist() == [[False, True, True, False], [False, True, True, False]]
    assert smallest(noise, allowed, torch.tensor([0, 9])).sum(1).tolist() == [0, 3]


def test_tokens_count_up_to_the_first_eos() -> None:
    tokens = torch.tensor([[5, 9, 5, 9], [5, 5, 5, 5], [9, 9, 9, 9]])
    expected = [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert completion_tokens(tokens, eos_id=9).tolist() == expected


def test_a_block_causal_model_is_refused(tmp_path: Path) -> None:
    denoiser = toy_denoiser(LENGTH)
    denoiser.model.config.block_size = 2
    with pytest.raises(ValueError, match=r"coupled masks whole completions.*block-causal"):
        built(options("coupled", tmp_path), denoiser)
