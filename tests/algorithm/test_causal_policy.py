"""Block-causal models: what is sampled is what is trained, by one pass per trajectory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo.algorithm.advantages import egspo_advantages, egspo_sa_advantages
from egspo.algorithm.micro_batches import Columns, MicroBatches
from egspo.algorithm.replay import Scorer
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, GenerationConfig
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout
from egspo.rollouts.trajectory import NEVER, PromptBatch, Trajectory
from tests.algorithm.test_enumeration import (
    ALGORITHM,
    all_steps,
    estimator_gradient,
    relative_error,
    true_gradient,
)
from tests.families import BLOCK_CAUSAL, make
from tests.helpers.toy import MASK, VOCAB, Enumeration, enumerate_trajectories, reward

TINY = GenerationConfig(
    max_new_tokens=4, steps=4, block_length=2, temperature=0.8, batch_size=4096, early_exit=False
)
TINY_FIELDS: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 12,
    "vocab_size": VOCAB,
    "mask_token_id": MASK,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.7,
    "block_size": 2,
}
PROMPT = (0, 1, 0)  # one token of it in the first block of two

GENERATION = GenerationConfig(
    max_new_tokens=12, steps=6, block_length=4, temperature=0.9, batch_size=16
)
MASK_ID, EOS = 5, 1


def tiny_denoiser(family: str) -> Denoiser:
    """Four tokens, in float64."""
    model = make(family, seed=1, **TINY_FIELDS).double()
    return Denoiser(model, mask_id=MASK, eos_id=2, pad_id=0)


def small_denoiser(family: str, dtype: torch.dtype = torch.float32) -> Denoiser:
    model = make(family, max_position_embeddings=256).to(dtype)
    return Denoiser(model, mask_id=MASK_ID, eos_id=EOS, pad_id=EOS)


def prompts_of(lengths: list[int]) -> PromptBatch:
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randint(6, 60, (n,), generator=generator).tolist() for n in lengths]
    return PromptBatch.from_lists(lists, EOS)


def block_logits(denoiser: Denoiser, prompt: Tensor, canvas: Tensor, start: int) -> Tensor:
    """Logits [L, V] at the block that begins at ``start``: of nothing behind it."""
    size = denoiser.block_size
    assert size is not None and (len(prompt) + start) % size == 0
    ids = torch.cat([prompt, canvas])[: len(prompt) + start + size]
    logits = denoiser.model(ids[None]).logits[0, len(prompt) :]
    return torch.nn.functional.pad(logits, (0, 0, 0, len(canvas) - len(logits)))


def enumerated(
    denoiser: Denoiser, config: GenerationConfig = TINY, prompt: tuple[int, ...] = PROMPT
) -> Enumeration:
    """Every trajectory, its probabilities from passes over whole sequences."""

    def logits_of(canvas: list[int], start: int) -> Tensor:
        return block_logits(denoiser, torch.tensor(prompt), torch.tensor(canvas), start)

    return enumerate_trajectories(denoiser, config, logits_of, prompt, causal=True)


def group_advantages(
    denoiser: Denoiser, enumeration: Enumeration, algorithm: AlgorithmConfig
) -> tuple[Tensor, float]:
    """Of every step, times the probability, summed over all pairs; and the share that is left."""
    trajectory, probability = enumeration.trajectory, enumeration.probability.detach()
    selected = all_steps(enumeration)
    count, steps = selected.shape
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    rewards, valid = reward(trajectory.tokens)[pairs], torch.ones(len(pairs), 2, steps).bool()
    if algorithm.stepwise:
        states = States.from_selection(trajectory, selected)
        scorer = Scorer(denoiser, algorithm, TINY)
        replayed = scorer.replay(states, states.micro_batches(1000, ranks=None), complete=True)
        values = torch.empty(count, steps, dtype=torch.float64)
        values[states.row, states.rank] = reward(replayed.completions)
        lam = torch.tensor(0.5, dtype=torch.float64)
        advantage = egspo_sa_advantages(
            rewards, values[pairs], valid, lam, returns="joint", baseline="rank"
        )
    else:
        advantage = egspo_advantages(rewards, valid)
    weighted = advantage * probability[pairs].prod(1)[:, None, None] / 2
    summed = torch.zeros(count, steps, dtype=torch.float64)
    for member in (0, 1):
        summed.index_add_(0, pairs[:, member], weighted[:, member])
    return summed, 1 / 2


@pytest.mark.parametrize("method", ["egspo", "egspo-sa", "egspo-sa-active"])
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_the_gradient_is_exact(family: str, method: str) -> None:
    """Expectation over pairs of trajectories; a member's own share scales it by (G - 1) / G."""
    denoiser = tiny_denoiser(family)
    enumeration = enumerated(denoiser)
    assert float(enumeration.probability.detach().sum()) == pytest.approx(1.0, abs=1e-10)
    assert set(enumeration.trajectory.steps.tolist()) == {4}
    algorithm = replace(
        ALGORITHM,
        stepwise=method != "egspo",
        completion_blocks="active" if method.endswith("active") else "all",
    )
    summed, share = group_advantages(denoiser, enumeration, algorithm)
    estimate = estimator_gradient(
        denoiser, enumeration, all_steps(enumeration), summed, TINY, algorithm
    )
    # What the rotation, in float32, leaves of float64 gradients is smaller.
    assert relative_error(estimate, share * true_gradient(denoiser, enumeration)) < 1e-6


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_rollout_samples_the_policy(family: str) -> None:
    """Frequencies of the completions against their enumerated probabilities."""
    denoiser = tiny_denoiser(family)
    enumeration = enumerated(denoiser)
    place = VOCAB ** torch.arange(4)
    expected = torch.zeros(VOCAB**4, dtype=torch.float64)
    keys = (enumeration.trajectory.tokens * place).sum(1)
    expected.index_add_(0, keys, enumeration.probability.detach())
    count = 2048
    prompts = PromptBatch.from_lists([PROMPT] * count, 0)
    sampled = rollout(denoiser, prompts, TINY, seed=3, sequence_ids=torch.arange(count))
    seen = torch.bincount((sampled.tokens * place).sum(1), minlength=len(expected)).double()
    assert bool((seen[expected == 0] == 0).all())
    large = expected * count >= 5
    statistic = ((seen - count * expected).square() / (count * expected))[large].sum()
    cells = int(large.sum())
    assert cells > 10
    assert float(statistic) < cells + 4 * (2 * cells) ** 0.5 + 4


# --- Rollout


def recorded_log_probs(denoiser: Denoiser, sampled: Trajectory, config: GenerationConfig) -> Tensor:
    """float64 [B, T] of what a trajectory revealed, from passes over whole sequences."""
    result = torch.zeros(sampled.log_prob.shape, dtype=torch.float64)
    for row in range(len(sampled)):
        prompt = sampled.prompts.ids[row][sampled.prompts.mask[row]]
        for step in range(int(sampled.steps[row])):
            canvas = sampled.canvas(torch.tensor([row]), torch.tensor([step]))[0]
            places = (sampled.unmask_step[row] == step).nonzero()[:, 0]
            start = int(places[0]) - (len(prompt) + int(places[0])) % config.block_length
            with torch.no_grad():
                logits = block_logits(denoiser, prompt, canvas, start).double()
            logits[:, denoiser.mask_id] = -torch.inf
            chosen = (logits / config.temperature).log_softmax(1)
            result[row, step] = chosen[places, sampled.tokens[row, places]].sum()
    return result


@pytest.mark.parametrize("threshold", [None, 0.05])
@pytest.mark.parametrize("policy", ["max_prob", "low_confidence", "random", "left_to_right"])
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_the_cache_is_exact_behind_any_prompt(
    family: str, policy: Any, threshold: float | None
) -> None:
    """Prompts shorter than a block, of whole blocks and of parts; in batches of three."""
    if threshold is not None and policy in ("random", "left_to_right"):
        pytest.skip("its scores are no probabilities")
    denoiser = small_denoiser(family, torch.float64)
    config = replace(GENERATION, policy=policy, threshold=threshold, batch_size=3, early_exit=False)
    prompts = prompts_of([1, 3, 4, 5, 8, 10, 11])
    sampled = rollout(denoiser, prompts, config, seed=0, sequence_ids=torch.arange(7))
    assert bool((sampled.tokens != MASK_ID).all())
    if threshold is not None:
        assert len(set(sampled.steps.tolist())) > 1
    expected = recorded_log_probs(denoiser, sampled, config)
    torch.testing.assert_close(sampled.log_prob, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_a_sequence_is_the_same_alone_and_in_any_batch(family: str) -> None:
    denoiser = small_denoiser(family, torch.float64)
    prompts, config = prompts_of([3, 9, 9, 6, 1]), replace(GENERATION, batch_size=2)
    together = rollout(denoiser, prompts, config, seed=5, sequence_ids=torch.arange(5))
    for row in range(5):
        one = PromptBatch(prompts.ids[row : row + 1], prompts.mask[row : row + 1])
        alone = rollout(denoiser, one, config, seed=5, sequence_ids=torch.tensor([row]))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.unmask_step[0], together.unmask_step[row])
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[row], rtol=0, atol=1e-9)


def test_bitwise_at_equal_shapes() -> None:
    """Sequences that fill their batches alike: nothing depends on who else is in it."""
    denoiser = small_denoiser("sdar")
    prompts, config = prompts_of([8] * 4), replace(GENERATION, early_exit=False)
    first = rollout(denoiser, prompts, config, seed=5, sequence_ids=torch.arange(4))
    # Each at its own row: a matrix product may round other rows otherwise.
    others = prompts.ids.roll(1, 1)
    for row in range(4):
        ids = others.clone()
        ids[row] = prompts.ids[row]
        sequence_ids = torch.arange(10, 14)
        sequence_ids[row] = row
        batch = PromptBatch(ids, prompts.mask)
        second = rollout(denoiser, batch, config, seed=5, sequence_ids=sequence_ids)
        assert torch.equal(second.tokens[row], first.tokens[row])
        assert torch.equal(second.log_prob[row], first.log_prob[row])
        assert not torch.equal(second.tokens, first.tokens)


def test_a_prompt_is_computed_once_for_its_group_and_a_step_one_block() -> None:
    denoiser = small_denoiser("sdar")
    config = replace(GENERATION, batch_size=3, early_exit=False)
    lists = [[7, 8, 9, 10, 11, 12, 13, 14]] * 6
    before = denoiser.work.copy()
    rollout(
        denoiser, PromptBatch.from_lists(lists, EOS), config, seed=0, sequence_ids=torch.arange(6)
    )
    work = denoiser.work - before
    # Two batches of three: the prompt once, six steps of a block, and two clean blocks ridden.
    assert work.tokens == 8 + 2 * 3 * (6 * 4 + 2 * 4)
    assert work.forwards == 1 + 2 * 6
    assert work.head_rows == 6 * 3 * (4 + 2)


def test_early_exit_retires_and_refills() -> None:
    denoiser = small_denoiser("sdar", torch.float64)
    prompts, ids = prompts_of([3, 9, 9, 6, 1, 5, 7, 2]), torch.arange(8)
    config = replace(GENERATION, max_new_tokens=40, steps=20, batch_size=3)
    early = rollout(denoiser, prompts, config, seed=2, sequence_ids=ids)
    whole = rollout(denoiser, prompts, replace(config, early_exit=False), seed=2, sequence_ids=ids)
    assert torch.equal(early.lengths, whole.lengths)
    assert bool((early.steps < whole.steps).any())
    for row in range(8):
        end = int(early.lengths[row])
        assert torch.equal(early.tokens[row, :end], whole.tokens[row, :end])
        assert bool((early.tokens[row][early.unmask_step[row] == NEVER] == EOS).all())


def test_out_of_memory_computes_the_caches_again(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = small_denoiser("sdar", torch.float64)
    prompts, ids = prompts_of([3, 9, 9, 6]), torch.arange(4)
    config = replace(GENERATION, early_exit=False)
    expected = rollout(denoiser, prompts, config, seed=2, sequence_ids=ids)
    cached, calls = Denoiser.cached_hidden_states, []

    def fails(self: Denoiser, input_ids: Tensor, *rest: Any) -> Tensor:
        calls.append(len(input_ids))
        if len(calls) == 4:  # in the second block
            raise torch.OutOfMemoryError("full")
        return cached(self, input_ids, *rest)

    monkeypatch.setattr(Denoiser, "cached_hidden_states", fails)
    split = rollout(denoiser, prompts, config, seed=2, sequence_ids=ids)
    assert 2 in calls and torch.equal(split.tokens, expected.tokens)
    torch.testing.assert_close(split.log_prob, expected.log_prob, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_length": 6}, "generation.block_length must be the block size of the model, 4"),
        ({"cache": "dual"}, "generation.cache: dual is of models with full attention"),
        ({"guidance": 1.0}, "generation.guidance is not implemented"),
    ],
)
def test_options_without_a_meaning_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rollout(
            small_denoiser("sdar"),
            prompts_of([3]),
            replace(GENERATION, **fields),
            seed=0,
            sequence_ids=torch.arange(1),
        )


def test_entropy_over_all_masks_is_refused() -> None:
    with pytest.raises(ValueError, match="entropy_over: masked needs every masked position"):
        rollout(
            small_denoiser("sdar"),
            prompts_of([3]),
            GENERATION,
            seed=0,
            sequence_ids=torch.arange(1),
            entropy_over="masked",
        )


# --- Replay, update, completions


def states_of(denoiser: Denoiser) -> States:
    prompts = prompts_of([3, 9, 9, 6, 8])
    config = replace(GENERATION, early_exit=False)
    sampled = rollout(denoiser, prompts, config, seed=1, sequence_ids=torch.arange(5))
    selected = torch.tensor([[0, 2, 5], [1, 2, -1], [4, 0, 3], [5, 1, -1], [3, 5, 0]])
    return States.from_selection(sampled, selected)


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_one_pass_gives_the_log_probs_and_gradients_of_many(family: str) -> None:
    denoiser = small_denoiser(family)
    states = states_of(denoiser)
    scorer = Scorer(denoiser, AlgorithmConfig(beta=0.0), GENERATION)
    advantage = torch.randn(len(states), generator=torch.Generator().manual_seed(0)).double()
    gradients = []
    for size in (100, 4, 1):
        limit = MicroBatches(size, None, GENERATION, 0, causal=True)
        groups = limit.plan(states, ranks=None)
        scores = scorer.replay(states, groups, complete=True, limit=limit)
        recorded = states.trajectory.log_prob[states.row, states.step].double()
        torch.testing.assert_close(scores.old_log_prob, recorded, rtol=0, atol=1e-5)
        denoiser.model.zero_grad()
        for index in groups[0]:
            before = denoiser.work.copy()
            outcome = scorer.surrogate(states, index, scores, advantage, 1.0)
            assert torch.equal(outcome.ratio, torch.ones_like(outcome.ratio))
            made = (denoiser.work - before).tokens
            assert made == Columns.of(states, GENERATION, 0, causal=True).count(index.tolist())
            outcome.loss.backward()
        gradients.append(
            [p.grad.clone() for p in denoiser.model.parameters() if p.grad is not None]
        )
    for other in gradients[1:]:
        for mine, theirs in zip(gradients[0], other, strict=True):
            scale = float(mine.abs().max())
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5 * max(scale, 1.0))


def chain(denoiser: Denoiser, states: States, number: int, later: bool) -> Tensor:
    """The one-step completion of a state by its definition."""
    trajectory, row = states.trajectory, states.row[number]
    prompt = trajectory.prompts.ids[row][trajectory.prompts.mask[row]]
    canvas = trajectory.canvas(row[None], states.step[number][None])[0]
    size, length = GENERATION.block_length, len(canvas)
    start = int(states.block_starts(size, causal=True)[number])
    while start < length:
        with torch.no_grad():
            logits = block_logits(denoiser, prompt, canvas, start)
        logits[:, denoiser.mask_id] = -torch.inf
        inside = torch.arange(length) < start + size
        canvas = logits.argmax(1).where(inside & (canvas == denoiser.mask_id), canvas)
        start += size
        if not later or bool((canvas[: max(start, 0)] == denoiser.eos_id).any()):
            break
    return canvas.masked_fill(torch.arange(length) >= start, denoiser.eos_id)


@pytest.mark.parametrize("blocks", ["all", "active"])
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_one_step_completions_are_chains_of_greedy_blocks(family: str, blocks: Any) -> None:
    denoiser = small_denoiser(family, torch.float64)
    states = states_of(denoiser)
    algorithm = AlgorithmConfig(beta=0.0, completion_blocks=blocks)
    scorer = Scorer(denoiser, algorithm, GENERATION)
    scores = scorer.replay(states, states.micro_batches(5, ranks=None), complete=True)
    assert scores.completions is not None
    expected = [chain(denoiser, states, n, blocks == "all") for n in range(len(states))]
    assert torch.equal(scores.completions, torch.stack(expected))


def test_columns_are_trimmed_to_what_is_needed() -> None:
    """Ten of the prompt and so many of the completion, and a block per state."""
    columns = Columns(GENERATION, 0, [0, 0, 1], [10, 10, 8], [-2, 6, 4], causal=True)
    assert columns.count([0]) == 8 + 4
    assert columns.count([1]) == 16 + 4
    assert columns.count([0, 1]) == 16 + 2 * 4
    assert columns.count([0, 1, 2]) == 2 * (16 + 2 * 4)
