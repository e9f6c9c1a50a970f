"""Block-cached decoding as the policy: what is sampled is what is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo.algorithm.replay import Scorer
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, GenerationConfig
from egspo.models import new_model
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout
from egspo.rollouts.trajectory import PromptBatch
from egspo_kernels import sample_tokens
from tests.algorithm.test_enumeration import (
    ALGORITHM,
    all_steps,
    estimator_gradient,
    relative_error,
    true_gradient,
)
from tests.algorithm.test_replay import prompts_of, small_denoiser
from tests.helpers.cached import cached_hidden
from tests.helpers.toy import MASK, PROMPT, VOCAB, Enumeration, enumerate_trajectories, reward

TINY = GenerationConfig(
    max_new_tokens=4, steps=4, block_length=2, temperature=0.8, batch_size=4096, early_exit=False
)
GENERATION = GenerationConfig(
    max_new_tokens=12, steps=6, block_length=4, temperature=0.9, batch_size=16
)
CACHES: list[Any] = ["prefix", "dual"]


def enumerable_denoiser() -> Denoiser:
    """A LLaDA of four tokens in float64."""
    fields = {
        "d_model": 8,
        "n_layers": 2,
        "n_heads": 2,
        "mlp_hidden_size": 12,
        "vocab_size": VOCAB,
        "embedding_size": VOCAB,
        "max_sequence_length": 8,
        "mask_token_id": MASK,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "init_std": 0.7,
    }
    model = new_model(fields, seed=1).double()
    return Denoiser(model, mask_id=MASK, eos_id=2, pad_id=0)


def enumerate_cached(denoiser: Denoiser, config: GenerationConfig) -> Enumeration:
    """Every trajectory of the cached policy, its probabilities from :mod:`tests.helpers.cached`."""
    prompt = torch.tensor(PROMPT)

    def logits_of(canvas: list[int], start: int) -> Tensor:
        now = torch.tensor(canvas)
        built = now.clone()
        built[start:] = MASK
        end = start + config.block_length if config.cache == "dual" else config.max_new_tokens
        columns = torch.arange(start, end) + len(prompt)
        ids, built_ids = torch.cat([prompt, now]), torch.cat([prompt, built])
        hidden = cached_hidden(denoiser.model, built_ids, ids, columns)  # type: ignore[arg-type]
        logits = torch.zeros(config.max_new_tokens, VOCAB, dtype=torch.float64)
        return logits.index_copy(0, torch.arange(start, end), hidden @ denoiser.head_weight.t())

    return enumerate_trajectories(denoiser, config, logits_of)


def exact_gradient_and_estimate(
    cache: Any, *, detach: bool = False, selected_from: str | None = None
) -> tuple[Tensor, Tensor]:
    denoiser, config = enumerable_denoiser(), replace(TINY, cache=cache)
    enumeration = enumerate_cached(denoiser, config)
    assert float(enumeration.probability.detach().sum()) == pytest.approx(1.0, abs=1e-10)
    value = reward(enumeration.trajectory.tokens) * enumeration.probability.detach()
    estimate = estimator_gradient(
        denoiser,
        enumeration,
        all_steps(enumeration),
        value[:, None].expand(-1, config.steps),
        config if selected_from is None else replace(config, cache=selected_from),  # type: ignore[arg-type]
        replace(ALGORITHM, detach_cache=detach),
    )
    return true_gradient(denoiser, enumeration), estimate


@pytest.mark.parametrize("cache", CACHES)
def test_gradient_of_the_cached_policy_is_exact(cache: str) -> None:
    truth, estimate = exact_gradient_and_estimate(cache)
    assert relative_error(estimate, truth) < 1e-6


@pytest.mark.parametrize("cache", CACHES)
def test_detaching_the_cache_is_a_bias(cache: str) -> None:
    truth, estimate = exact_gradient_and_estimate(cache, detach=True)
    assert relative_error(estimate, truth) > 1e-2


@pytest.mark.parametrize("cache", CACHES)
def test_scoring_by_full_attention_would_be_a_bias(cache: str) -> None:
    truth, estimate = exact_gradient_and_estimate(cache, selected_from="none")
    assert relative_error(estimate, truth) > 1e-2


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.slow
def test_rollout_samples_the_cached_policy(cache: Any) -> None:
    """Frequencies of the completions against their enumerated probabilities."""
    denoiser, config = enumerable_denoiser(), replace(TINY, cache=cache)
    enumeration = enumerate_cached(denoiser, config)
    place = VOCAB ** torch.arange(4)
    expected = torch.zeros(VOCAB**4, dtype=torch.float64)
    keys = (enumeration.trajectory.tokens * place).sum(1)
    expected.index_add_(0, keys, enumeration.probability.detach())
    count = 4096
    prompts = PromptBatch.from_lists([PROMPT] * count, 0)
    sampled = rollout(denoiser, prompts, config, seed=3, sequence_ids=torch.arange(count))
    seen = torch.bincount((sampled.tokens * place).sum(1), minlength=len(expected)).double()
    assert bool((seen[expected == 0] == 0).all())
    large = expected * count >= 5
    statistic = ((seen - count * expected).square() / (count * expected))[large].sum()
    cells = int(large.sum())
    assert cells > 10
    assert float(statistic) < cells + 4 * (2 * cells) ** 0.5 + 4


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("cache", ["none", *CACHES])
def test_replay_gives_the_log_probs_of_the_rollout(cache: Any, guidance: float) -> None:
    config = replace(GENERATION, cache=cache, guidance=guidance)
    denoiser, prompts = small_denoiser(), prompts_of([3, 6, 6, 1, 4])
    sampled = rollout(denoiser, prompts, config, seed=1, sequence_ids=torch.arange(5))
    row, step = (torch.arange(config.steps) < sampled.steps[:, None]).nonzero(as_tuple=True)
    selected = torch.full((5, config.steps), -1).index_put((row, step), step)
    states = States.from_selection(sampled, selected)
    scorer = Scorer(denoiser, AlgorithmConfig(beta=0.0), config)
    for size in (1, 4, 100):
        groups = states.micro_batches(size, ranks=None)
        scores = scorer.replay(states, groups, complete=True)
        recorded = sampled.log_prob[states.row, states.step].double()
        torch.testing.assert_close(scores.old_log_prob, recorded, rtol=0, atol=1e-5)
        for index in groups[0]:
            outcome = scorer.surrogate(states, index, scores, torch.ones(len(states)), 1.0)
            assert torch.equal(outcome.ratio, torch.ones_like(outcome.ratio))


@pytest.mark.parametrize("cache", ["none", *CACHES])
def test_replay_is_bitwise_the_rollout_at_equal_shapes(cache: Any) -> None:
    """The last steps of a block reveal all that is masked: every product has the same shape.

    The logits are the same bits: sampled from once more, they give the tokens and the recorded
    log-probabilities. Scoring adds the same exponentials as sampling, but not block by block: sums
    of 20 of them in float32 differ by 2 x 20 x 2^-24 = 2.4e-6 at most, for each of two tokens, and
    results below 16 are rounded to 2^-21.
    """
    config = replace(GENERATION, cache=cache, early_exit=False)
    denoiser, prompts = small_denoiser(), prompts_of([5, 5, 5, 5])
    sampled = rollout(denoiser, prompts, config, seed=1, sequence_ids=torch.arange(4))
    scorer = Scorer(denoiser, AlgorithmConfig(beta=0.0), config)
    for step in (1, 3, 5):
        states = States.from_selection(sampled, torch.full((4, 1), step))
        recorded = sampled.log_prob[:, step]
        token, log_prob = sampled_again(scorer, states, step % 2)
        assert torch.equal(token, sampled.tokens[sampled.unmask_step == step])
        assert torch.equal(log_prob, recorded)
        scores = scorer.replay(states, states.micro_batches(4, ranks=None), complete=False)
        assert scores.old_log_prob is not None
        torch.testing.assert_close(scores.old_log_prob, recorded.double(), rtol=0, atol=6e-6)


@torch.no_grad()
def sampled_again(scorer: Scorer, states: States, step: int) -> tuple[Tensor, Tensor]:
    """Tokens [N] and log-probabilities [m] of a block's step, from the logits of the replay."""
    batch = scorer._batch(states, torch.arange(len(states)))
    denoiser, config = scorer.denoiser, scorer.generation
    sample = sample_tokens(
        denoiser.logits(batch.revealed_rows(batch.window(scorer.decoder)[0])),
        temperature=config.temperature,
        seed=1,
        step=step,
        row_ids=states.row[batch.step_ids] * config.max_new_tokens + batch.positions,
        banned_token=denoiser.mask_id,
    )
    total = torch.zeros(len(batch)).index_add_(0, batch.step_ids, sample.log_prob)
    return sample.token, total


def test_micro_batches_keep_the_states_of_a_trajectory_together() -> None:
    config = replace(GENERATION, cache="dual", early_exit=False)
    prompts = prompts_of([5, 5, 5])
    sampled = rollout(small_denoiser(), prompts, config, seed=1, sequence_ids=torch.arange(3))
    selected = torch.tensor([[5, 0, 1], [2, 3, -1], [4, 1, 5]])
    states = States.from_selection(sampled, selected)
    (group,) = states.micro_batches(3, ranks=None, by_trajectory=True)
    order = torch.cat(group)
    assert [len(index) for index in group] == [3, 3, 2]
    assert states.row[order].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert states.step[order].tolist() == [0, 1, 5, 2, 3, 1, 4, 5]


def test_states_of_a_block_share_its_cache() -> None:
    """Two steps of one block of one trajectory: one pass builds the cache of both."""
    config = replace(GENERATION, cache="dual", early_exit=False)
    denoiser = small_denoiser()
    sampled = rollout(denoiser, prompts_of([5]), config, seed=1, sequence_ids=torch.arange(1))
    scorer = Scorer(denoiser, AlgorithmConfig(beta=0.0), config)
    for steps, builds in (([2, 3], 1), ([1, 2], 2)):
        states = States.from_selection(sampled, torch.tensor([steps]))
        before = denoiser.work.copy()
        scorer.replay(states, states.micro_batches(2, ranks=None), complete=False)
        work = denoiser.work - before
        assert work.tokens == builds * (5 + 12) + 2 * 4
