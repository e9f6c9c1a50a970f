"""The estimator against the true policy gradient, by enumerating every trajectory."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from egspo.algorithm.advantages import egspo_advantages, egspo_sa_advantages
from egspo.algorithm.replay import Scorer
from egspo.algorithm.selection import select
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, GenerationConfig
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout
from egspo.rollouts.trajectory import PromptBatch, Trajectory
from tests.helpers.toy import PROMPT, Enumeration, enumerate_trajectories, reward, toy_denoiser

GENERATION = GenerationConfig(max_new_tokens=4, steps=3, block_length=4, temperature=0.8)
ALGORITHM = AlgorithmConfig(strategy="all", aggregation="exact", beta=0.0)
EXACT = ["max_prob", "margin", "entropy", "random", "left_to_right"]


def flat_gradient(value: Tensor, denoiser: Denoiser) -> Tensor:
    """In everything that is trained, as one vector."""
    trained = [p for p in denoiser.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, trained, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def true_gradient(denoiser: Denoiser, enumeration: Enumeration) -> Tensor:
    """Gradient of the expected reward, by differentiating the sum over trajectories."""
    total = (enumeration.probability * reward(enumeration.trajectory.tokens)).sum()
    return flat_gradient(total, denoiser)


def estimator_gradient(
    denoiser: Denoiser,
    enumeration: Enumeration,
    selected: Tensor,
    advantage: Tensor,
    generation: GenerationConfig = GENERATION,
    algorithm: AlgorithmConfig = ALGORITHM,
) -> Tensor:
    """Expectation of minus the loss's gradient, through the code that trains.

    Args:
        selected: [B, K] steps.
        advantage: [B, K], already multiplied by the probability of the trajectory: the loss is
            linear in the advantage at ratio 1.
    """
    scorer = Scorer(denoiser, algorithm, generation)
    states = States.from_selection(enumeration.trajectory, selected)
    groups = states.micro_batches(1000, ranks=None)
    scores = scorer.replay(states, groups, complete=False)
    total = torch.zeros(())
    for index in groups[0]:
        outcome = scorer.surrogate(
            states, index, scores, advantage[states.row, states.rank], weight=1.0
        )
        assert torch.equal(outcome.ratio, torch.ones_like(outcome.ratio))
        total = total - flat_gradient(outcome.loss, denoiser)
    return total


def all_steps(enumeration: Enumeration) -> Tensor:
    """The steps that each trajectory took, -1 beyond."""
    trajectory = enumeration.trajectory
    steps = torch.arange(trajectory.num_steps)
    return steps.where(steps < trajectory.steps[:, None], -1)


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    return float((estimate - truth).norm() / truth.norm())


def setup(policy: str, seed: int = 0) -> tuple[Denoiser, Enumeration]:
    denoiser = toy_denoiser(GENERATION.max_new_tokens, seed)
    return denoiser, enumerate_trajectories(denoiser, replace(GENERATION, policy=policy))


@pytest.mark.parametrize("policy", [*EXACT, "low_confidence"])
def test_enumeration_is_complete(policy: str) -> None:
    _, enumeration = setup(policy)
    assert float(enumeration.probability.detach().sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("policy", EXACT)
def test_unbiased_with_any_state_dependent_baseline(policy: str) -> None:
    denoiser, enumeration = setup(policy)
    trajectory = enumeration.trajectory
    selected = all_steps(enumeration)
    states = States.from_selection(trajectory, selected)
    canvas = trajectory.canvas(states.row, states.step)
    baseline = torch.zeros(selected.shape, dtype=torch.float64)
    baseline[states.row, states.rank] = torch.cos(3.0 * reward(canvas) + states.step)
    advantage = reward(trajectory.tokens)[:, None] - baseline
    weighted = advantage * enumeration.probability.detach()[:, None]
    estimate = estimator_gradient(denoiser, enumeration, selected, weighted)
    assert relative_error(estimate, true_gradient(denoiser, enumeration)) < 1e-6


@pytest.mark.parametrize("most", [None, 2])
def test_unbiased_with_a_threshold(most: int | None) -> None:
    """How many positions a step reveals depends on the logits alone: its product is exact."""
    config = replace(
        GENERATION,
        steps=4,
        block_length=2 if most is None else 4,
        threshold=0.5,
        max_tokens_per_step=most,
    )
    denoiser = toy_denoiser(4, seed=2)
    enumeration = enumerate_trajectories(denoiser, config)
    trajectory = enumeration.trajectory
    assert float(enumeration.probability.detach().sum()) == pytest.approx(1.0, abs=1e-12)
    assert len(trajectory.steps.unique()) > 1
    value = reward(trajectory.tokens) * enumeration.probability.detach()
    estimate = estimator_gradient(
        denoiser, enumeration, all_steps(enumeration), value[:, None].expand(-1, 4), config
    )
    assert relative_error(estimate, true_gradient(denoiser, enumeration)) < 1e-6

    sampled = rollout(
        denoiser,
        PromptBatch.from_lists([PROMPT] * 2000, 0),
        replace(config, batch_size=2000, early_exit=False),
        seed=0,
        sequence_ids=torch.arange(2000),
    )
    known = {tuple(a + b) for a, b in zip(*_outcome(trajectory), strict=True)}
    assert {tuple(a + b) for a, b in zip(*_outcome(sampled), strict=True)} <= known


def _outcome(trajectory: Trajectory) -> tuple[list[list[int]], list[list[int]]]:
    return trajectory.tokens.tolist(), trajectory.unmask_step.tolist()


@pytest.mark.parametrize("policy", ["max_prob", "random"])
@pytest.mark.parametrize("method", ["egspo", "joint-rank", "joint-group", "split"])
def test_unbiased_with_group_baselines(policy: str, method: str) -> None:
    """Expectation over pairs of trajectories; a member's own share scales it by (G - 1) / G."""
    config = replace(GENERATION, policy=policy, max_new_tokens=3, block_length=3, steps=2)
    denoiser = toy_denoiser(3, seed=1)
    enumeration = enumerate_trajectories(denoiser, config)
    trajectory, probability = enumeration.trajectory, enumeration.probability.detach()
    selected = all_steps(enumeration)
    count, steps = selected.shape
    scorer = Scorer(denoiser, ALGORITHM, GENERATION)
    states = States.from_selection(trajectory, selected)
    replayed = scorer.replay(states, states.micro_batches(1000, ranks=None), complete=True)
    values = torch.empty(count, steps, dtype=torch.float64)
    values[states.row, states.rank] = reward(replayed.completions)

    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    rewards = reward(trajectory.tokens)[pairs]
    valid = torch.ones(len(pairs), 2, steps, dtype=torch.bool)
    if method == "egspo":
        advantage = egspo_advantages(rewards, valid)
    else:
        returns, _, baseline = method.partition("-")
        advantage = egspo_sa_advantages(
            rewards,
            values[pairs],
            valid,
            torch.tensor(0.5, dtype=torch.float64),
            returns=returns,
            baseline=baseline or "group",
        )
    weighted = advantage * probability[pairs].prod(1)[:, None, None] / 2
    summed = torch.zeros(count, steps, dtype=torch.float64)
    for member in (0, 1):
        summed.index_add_(0, pairs[:, member], weighted[:, member])
    estimate = estimator_gradient(denoiser, enumeration, selected, summed)
    truth = true_gradient(denoiser, enumeration)
    lam, own = 0.5, 1 / 2
    share = 1 - own
    if method == "split":
        # Only the trajectory term is centred by the group; the step term keeps its full weight.
        share = (1 - own + lam) / (1 + lam)
    assert relative_error(estimate, share * truth) < 1e-6


def test_low_confidence_is_biased() -> None:
    """Its order depends on the tokens drawn, so the product of probabilities is a surrogate."""
    denoiser, enumeration = setup("low_confidence")
    advantage = reward(enumeration.trajectory.tokens)[:, None].expand(-1, GENERATION.steps)
    weighted = advantage * enumeration.probability.detach()[:, None]
    estimate = estimator_gradient(denoiser, enumeration, all_steps(enumeration), weighted)
    assert relative_error(estimate, true_gradient(denoiser, enumeration)) > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_error_of_selection_obeys_the_entropy_bound(seed: int) -> None:
    """Dropping steps costs at most ``B * sum of their entropies``, least for the top ones.

    With free logits, ``E |grad log p| <= sqrt(2) (1 - sum p^2) <= sqrt(2) H`` for each token, so
    B is sqrt(2) times the largest advantage at temperature 1.
    """
    config = replace(GENERATION, policy="max_prob", temperature=1.0, steps=4)
    denoiser = toy_denoiser(4, seed, scale=2.0)
    enumeration = enumerate_trajectories(denoiser, config)
    trajectory, probability = enumeration.trajectory, enumeration.probability.detach()
    truth = true_gradient(denoiser, enumeration)
    advantage = reward(trajectory.tokens)
    limits = torch.full((len(trajectory),), 4)

    def error_and_bound(selected: Tensor) -> tuple[float, float]:
        weighted = (advantage * probability)[:, None].expand(selected.shape)
        estimate = estimator_gradient(denoiser, enumeration, selected, weighted, config)
        error = float((estimate - truth).norm())
        kept = torch.zeros_like(trajectory.entropy).scatter(1, selected, 1.0)
        dropped = (trajectory.entropy * (1 - kept)).sum(1)
        bound = math.sqrt(2) * float(advantage.abs().max() * (probability * dropped).sum())
        return error, bound

    for k in (1, 2, 3):
        error, bound = error_and_bound(select(trajectory, "high_entropy", k, limits=limits))
        assert error <= bound
        for fixed in itertools.combinations(range(4), k):
            other_error, other_bound = error_and_bound(
                torch.tensor(fixed).expand(len(trajectory), k)
            )
            assert other_error <= other_bound
            assert bound <= other_bound + 1e-12
