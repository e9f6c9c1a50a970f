"""The gradient that reaches the optimizer of a run, in expectation over every trajectory of every
group, against the exact one."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo.config import (
    AlgorithmConfig,
    CheckpointConfig,
    EvalConfig,
    GenerationConfig,
    ModelConfig,
    TrainConfig,
)
from egspo.config.presets import PRESETS
from egspo.engines.processes import Processes, process_state
from egspo.rollouts.denoiser import Denoiser
from tests.algorithm.test_cached_policy import enumerable_denoiser, enumerate_cached
from tests.algorithm.test_causal_policy import enumerated, tiny_denoiser
from tests.algorithm.test_enumeration import flat_gradient, relative_error
from tests.families import BLOCK_CAUSAL
from tests.helpers import runs
from tests.helpers.enumerated import Draws, EnumeratedRun, Outcome, data_of, expectation, text_of
from tests.helpers.toy import (
    MASK,
    PROMPT,
    Enumeration,
    TabularModel,
    enumerate_trajectories,
    toy_denoiser,
)

GENERATION = GenerationConfig(max_new_tokens=2, steps=2, block_length=2, temperature=0.8)
UNEVEN = replace(GENERATION, max_new_tokens=3, block_length=3)  # steps of two tokens and of one
ROOT = Path(__file__).parents[2]
PRESET: dict[str, dict[str, Any]] = {name: PRESETS[name]["algorithm"] for name in PRESETS}


def binary(text: str) -> float:
    """Most groups of two have equal rewards."""
    return float(text in ("0", "10"))


def smooth(text: str) -> float:
    return sum((3**i) * (int(c) + 1) for i, c in enumerate(text)) % 7 / 7


class Problem:
    """A policy of two denoising steps with free logits, and every trajectory of it."""

    def __init__(
        self,
        algorithm: dict[str, Any],
        generation: GenerationConfig = GENERATION,
        reward: Callable[[str], float] = binary,
        denoiser: Denoiser | None = None,
        enumeration: Enumeration | None = None,
        drawn: list[list[list[int]]] | None = None,
        prompt: tuple[int, ...] = PROMPT,
        seed: int = 8,  # where which of the steps has the larger entropy depends on the tokens
        **options: Any,
    ) -> None:
        fields = {"group_size": 2, "selected_steps": generation.steps, "beta": 0.0, **algorithm}
        self.config = TrainConfig(
            ModelConfig(config={}),
            generation=generation,
            algorithm=AlgorithmConfig(**fields),
            steps=10**6,
            mixed_precision="no",
            eval=EvalConfig(every=0),
            checkpoint=CheckpointConfig(every=0),
            **options,
        )
        self.denoiser = denoiser or toy_denoiser(generation.max_new_tokens, seed)
        if self.config.algorithm.beta and denoiser is None:
            other = TabularModel(generation.max_new_tokens, seed=5)
            self.denoiser = Denoiser(
                self.denoiser.model, mask_id=MASK, eos_id=2, pad_id=0, reference=other
            )
        self.enumeration = enumeration or enumerate_trajectories(self.denoiser, generation)
        self.reward, self.prompt = reward, prompt
        self.completions = self.enumeration.trajectory.tokens.tolist()
        self.drawn: list[Draws] = list(drawn or self.completions)
        self.probability = self.enumeration.probability.detach()

    def groups(self) -> tuple[list[list[Draws]], list[Tensor]]:
        """Every group, in one of its orders, and the probability of all of them."""
        size = self.config.algorithm.group_size
        every: list[list[Draws]] = []
        chances = []
        for group in itertools.combinations_with_replacement(range(len(self.drawn)), size):
            orders = math.factorial(size)
            for count in Counter(group).values():
                orders //= math.factorial(count)
            every.append([self.drawn[i] for i in group])
            chances.append(orders * self.probability[list(group)].prod())
        return every, chances

    def estimate(self, processes: Processes | None = None) -> tuple[Tensor, list[Outcome]]:
        """The expected gradient of the run."""
        groups, chances = self.groups()
        run = EnumeratedRun(
            self.config, self.denoiser, data_of(self.reward, self.prompt), processes
        )
        with pytest.MonkeyPatch.context() as patch:
            outcomes = run.groups(groups, patch)
        return expectation(outcomes, chances), outcomes

    def exact(self) -> Tensor:
        """Of the loss: minus the expected reward, times what the own share in the baseline leaves;
        plus beta times the KL at the states that are visited."""
        algorithm = self.config.algorithm
        rewards = torch.tensor([self.reward(text_of(c)) for c in self.completions])
        value = (self.enumeration.probability * rewards.double()).sum()
        own = 1 / algorithm.group_size
        if algorithm.returns == "split" and algorithm.stepwise:
            own /= 1 + algorithm.lam  # only the trajectory's term is centred by the group
        result = -(1 - own) * flat_gradient(value, self.denoiser)
        if algorithm.beta:
            result = result + algorithm.beta * flat_gradient(self._divergence(), self.denoiser)
        # An optimizer step for all, or one for each; and the tokens of a step in the schedule.
        result = result / (self.config.ranks if algorithm.schedule == "joint" else 1)
        generation = self.config.generation
        return result * generation.steps / generation.max_new_tokens

    def _divergence(self) -> Tensor:
        """Summed over steps, expected over states; of ``k3``, the divergence that its expected
        gradient is of: KL(reference, policy), written as the cross entropy."""
        trajectory, tau = self.enumeration.trajectory, self.config.generation.temperature
        models: list[Any] = [self.denoiser.model, self.denoiser.reference_model]
        total = torch.zeros((), dtype=torch.float64)
        for row in range(len(trajectory)):
            for step in range(trajectory.num_steps):
                canvas = trajectory.canvas(torch.tensor([row]), torch.tensor([step]))
                revealed = trajectory.unmask_step[row] == step
                ours, theirs = (
                    (model.logits(canvas)[0, revealed, :MASK] / tau).log_softmax(1)
                    for model in models
                )
                if self.config.algorithm.kl == "k3":
                    value = -(theirs.exp() * ours).sum()
                else:
                    value = (ours.exp() * (ours - theirs)).sum()
                total = total + self.probability[row] * value
        return total


def assert_exact(problem: Problem) -> list[Outcome]:
    exact = problem.exact()
    estimate, outcomes = problem.estimate()
    assert relative_error(estimate, exact) < 1e-6
    return outcomes


@pytest.mark.parametrize("schedule", ["joint", "per_step"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("preset", ["egspo", "egspo-sa"])
def test_the_gradient_of_a_run_is_exact(preset: str, beta: float, schedule: str) -> None:
    changes = {**PRESET[preset], "beta": beta, "schedule": schedule}
    outcomes = assert_exact(Problem(changes))
    equal = [outcome.metrics for outcome in outcomes if outcome.metrics["reward/equal_groups"]]
    assert len(outcomes) / 2 < len(equal) < len(outcomes)
    for metrics in equal:  # only what cannot have a gradient is left out
        assert metrics["skipped/groups"] == (preset == "egspo" and beta == 0)
        assert not (beta and (metrics["skipped/states"] or metrics["updates"] == 0))
    if preset == "egspo-sa":
        assert any(metrics["updates"] for metrics in equal)
        assert any(metrics["skipped/states"] == 4 for metrics in equal) == (beta == 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"kl": "exact", "beta": 0.3},
        {"entropy_share": 1.0},
        {"returns": "split"},
        {"lam_schedule": "late"},
        {"strategy": "all", "num_iterations": 1},
        {"group_size": 3},
        {"stepwise": False, "group_size": 3, "schedule": "per_step"},
    ],
    ids=lambda changes: "-".join(changes),
)
@pytest.mark.slow
def test_other_options_that_are_exact(changes: dict[str, Any]) -> None:
    problem = Problem(changes, reward=smooth)
    if "lam_schedule" in changes:  # of the first step 0: its own share is that of EGSPO
        assert problem.config.algorithm.normalize_returns
    assert_exact(problem)


@pytest.mark.slow
def test_steps_of_different_sizes() -> None:
    assert_exact(Problem({}, UNEVEN))


def blocks(cache: Any, changes: dict[str, Any], **options: Any) -> Problem:
    """Two blocks of a LLaDA."""
    generation = replace(GENERATION, block_length=1, cache=cache)
    denoiser = enumerable_denoiser()
    if cache == "none":
        model: Any = denoiser.model

        def logits(canvas: list[int], start: int) -> Tensor:
            whole: Tensor = model(input_ids=torch.tensor([[0, *canvas]])).logits[0, 1:]
            return whole

        enumeration = enumerate_trajectories(denoiser, generation, logits)
    else:
        enumeration = enumerate_cached(denoiser, generation)
    return Problem(changes, generation, denoiser=denoiser, enumeration=enumeration, **options)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.slow
def test_blocks_and_their_caches(cache: Any) -> None:
    """A completion that ends in the first is not denoised further."""
    outcomes = assert_exact(blocks(cache, {}))
    assert any(outcome.metrics["rollout/saved"] for outcome in outcomes)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        ("llada2", "egspo-sa"),
        *(
            pytest.param(family, preset, marks=SLOW)
            for family, preset in itertools.product(BLOCK_CAUSAL, ("egspo", "egspo-sa"))
            if (family, preset) != ("llada2", "egspo-sa")
        ),
    ],
)
def test_block_causal_models(family: str, preset: str) -> None:
    """Routers are trained too. The token of the prompt is in the first block of two, the second
    ends with the completion."""
    denoiser = tiny_denoiser(family)
    enumeration = enumerated(denoiser, GENERATION, PROMPT)
    changes = {**PRESET[preset], "beta": 0.0}
    outcomes = assert_exact(
        Problem(changes, GENERATION, denoiser=denoiser, enumeration=enumeration)
    )
    assert any(outcome.metrics["rollout/saved"] for outcome in outcomes)


@pytest.mark.parametrize(
    "family", ["sdar", pytest.param("sdar_moe", marks=SLOW), pytest.param("llada2", marks=SLOW)]
)
def test_members_that_share_a_prompt(family: str) -> None:
    """Its first two tokens are a block, which a group has in a pass of its own."""
    denoiser, prompt = tiny_denoiser(family), (0, 1, 0)
    enumeration = enumerated(denoiser, GENERATION, prompt)
    options: Any = {"denoiser": denoiser, "enumeration": enumeration, "prompt": prompt}
    changes = {**PRESET["egspo-sa"], "beta": 0.0, "share_prompts": "always"}
    outcomes = assert_exact(Problem(changes, GENERATION, **options))
    assert any((outcome.metrics["shared/update"] or 0) > 0 for outcome in outcomes)


def test_a_pipeline_of_a_policy_that_stands_still() -> None:
    outcomes = assert_exact(Problem({"beta": 0.3}, pipeline=True))
    assert [outcome.metrics["staleness"] for outcome in outcomes] == [0] + [1] * 44


def test_adaptive_k_divides_by_no_more_than_a_constant() -> None:
    """Against the estimate written out: of each group, all members and their selected steps."""
    problem = Problem({"stepwise": False, "entropy_share": 0.5, "selected_steps": 2}, reward=smooth)
    trajectory, probability = problem.enumeration.trajectory, problem.probability
    rewards = torch.tensor([smooth(text_of(c)) for c in problem.completions]).double()
    larger = trajectory.entropy.argmax(1)  # holds half of the entropy of two steps
    total = torch.zeros((), dtype=torch.float64)
    for row, step in enumerate(larger.tolist()):
        canvas = trajectory.canvas(torch.tensor([row]), torch.tensor([step]))
        revealed = (trajectory.unmask_step[row] == step).nonzero()[:, 0]
        model: Any = problem.denoiser.model
        log_probs = (model.logits(canvas)[0, revealed, :MASK] / 0.8).log_softmax(1)
        log_prob = log_probs.gather(1, trajectory.tokens[row, revealed, None]).sum()
        advantage = (rewards[row] - (probability * rewards).sum()) / 2  # the mean with itself in it
        total = total - probability[row] * advantage * log_prob / 2  # K is 2
    estimate, outcomes = problem.estimate()
    assert {outcome.metrics["selected/k"] for outcome in outcomes} == {1}
    assert relative_error(estimate, flat_gradient(total, problem.denoiser)) < 1e-6


# --- Several processes


def estimate_as_rank(file: Path, rank: int, port: int, changes: dict[str, Any]) -> None:
    runs._become_rank(rank, 2, port)
    process_state(timedelta(seconds=60))
    estimate, _ = Problem(changes).estimate(Processes(60.0))
    if rank == 0:
        torch.save(estimate, file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"beta": 0.3}, {"stepwise": False}, {"schedule": "per_step"}], ids=str
)
def test_members_of_a_group_in_two_processes(changes: dict[str, Any], tmp_path: Path) -> None:
    file, port = tmp_path / "estimate.pt", runs.free_port()
    ranks = [
        runs.forkserver().Process(target=estimate_as_rank, args=(file, rank, port, changes))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    assert relative_error(torch.load(file), Problem(changes).exact()) < 1e-6


# --- What is biased by design


def error(problem: Problem) -> float:
    """Of the expected gradient, whatever its length."""
    exact = problem.exact()
    estimate, _ = problem.estimate()
    return relative_error(exact * (estimate @ exact) / (exact @ exact), estimate)


LOW_CONFIDENCE = {
    "generation": replace(GENERATION, policy="low_confidence"),
    # Which position the first step reveals depends on what it draws at both.
    "drawn": [[[a, b], [c, c]] for a, b, c in itertools.product(range(MASK), repeat=3)],
}
BIASED: dict[str, tuple[Callable[..., Problem], float, float]] = {
    "`baseline: rank`": (partial(Problem, {"baseline": "rank"}), 12.4, 5.4),
    "`stop_at_eos: true`, EGSPO-SA": (partial(Problem, {"stop_at_eos": True}), 26.9, 12.2),
    "`stop_at_eos: true`, EGSPO": (
        partial(Problem, {"stop_at_eos": True, "stepwise": False}),
        42.9,
        14.9,
    ),
    "`scale_by_std: true`, EGSPO-SA": (partial(Problem, {"scale_by_std": True}), 16.8, 34.0),
    "`ratio_temperature: one` at temperature 0.8": (
        partial(Problem, {"ratio_temperature": "one"}),
        4.1,
        5.5,
    ),
    "one step of the two (`selected_steps: 1`, or `entropy_share: 0.5`)": (
        partial(Problem, {"selected_steps": 1}),
        74.7,
        62.2,
    ),
    "`aggregation: sum` or `mean`, a step of two tokens and one of one": (
        partial(Problem, {"aggregation": "sum"}, UNEVEN),
        21.8,
        32.9,
    ),
    "`policy: low_confidence`, EGSPO-SA": (partial(Problem, {}, **LOW_CONFIDENCE), 37.0, 45.5),
    "`policy: low_confidence`, EGSPO": (
        partial(Problem, {"stepwise": False}, **LOW_CONFIDENCE),
        36.6,
        45.2,
    ),
    "`detach_cache: true`, `cache: prefix`": (
        partial(blocks, "prefix", {"detach_cache": True}),
        36.3,
        35.3,
    ),
    "`detach_cache: true`, `cache: dual`": (
        partial(blocks, "dual", {"detach_cache": True}),
        37.9,
        39.7,
    ),
}
"""What an option costs in percent, of :func:`binary` and :func:`smooth` rewards."""


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.slow
def test_what_is_biased_by_design(name: str) -> None:
    """As docs/algorithm.md says; and only in direction, as none of it is a matter of rounding."""
    problem, *percent = BIASED[name]
    rewards = (binary, smooth) if name == "`baseline: rank`" else (binary,)
    for reward, expected in zip(rewards, percent, strict=False):
        assert 100 * error(problem(reward=reward)) == pytest.approx(expected, abs=0.05)
    row = f"| {name} | {percent[0]} % | {percent[1]} % |"
    assert row in (ROOT / "docs" / "algorithm.md").read_text("utf-8")
