"""Replay and update on a small LLaDA: the first ratio, padding, micro-batches, the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from egspo.algorithm.replay import Scorer
from egspo.algorithm.selection import select
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, GenerationConfig
from egspo.models import add_lora, new_model
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout
from egspo.rollouts.trajectory import PromptBatch, Trajectory
from egspo.rollouts.unmasking import POLICIES

MASK, EOS, PAD, VOCAB = 1, 2, 0, 20
GENERATION = GenerationConfig(
    max_new_tokens=8, steps=4, block_length=4, temperature=0.9, batch_size=16, early_exit=False
)
ALGORITHM = AlgorithmConfig(beta=0.0, aggregation="sum")


def small_denoiser(*, lora: bool = False, init_std: float = 0.3, **fields: int) -> Denoiser:
    model = new_model(
        {
            "d_model": 16,
            "n_layers": 2,
            "n_heads": 2,
            "mlp_hidden_size": 24,
            "vocab_size": VOCAB,
            "embedding_size": VOCAB,
            "max_sequence_length": 64,
            "mask_token_id": MASK,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "init_std": init_std,
            **fields,
        },
        seed=0,
    )
    if lora:
        model = add_lora(model, rank=4, alpha=8, dropout=0.5, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Denoiser(model, mask_id=MASK, eos_id=EOS, pad_id=PAD)


def prompts_of(lengths: list[int]) -> PromptBatch:
    generator = torch.Generator().manual_seed(3)
    lists = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return PromptBatch.from_lists(lists, PAD)


def sample(denoiser: Denoiser, lengths: list[int], **changes: object) -> Trajectory:
    config = replace(GENERATION, **changes)
    ids = torch.arange(len(lengths))
    return rollout(denoiser, prompts_of(lengths), config, seed=5, sequence_ids=ids)


def states_of(trajectory: Trajectory, k: int = 3) -> States:
    limits = torch.full((len(trajectory),), trajectory.num_steps)
    return States.from_selection(trajectory, select(trajectory, "high_entropy", k, limits=limits))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("by_rank", [False, True])
def test_first_ratio_is_exactly_one(policy: str, lora: bool, by_rank: bool) -> None:
    """With dropout configured, prompts of different lengths and a head that is not tied."""
    denoiser = small_denoiser(lora=lora)
    threshold = 1e-9 if policy == "entropy_bounded" else None
    trajectory = sample(denoiser, [5, 3, 9, 1, 4], policy=policy, threshold=threshold)
    states = states_of(trajectory)
    scorer = Scorer(denoiser, ALGORITHM, GENERATION)
    groups = states.micro_batches(4, ranks=3 if by_rank else None)
    assert len(groups) == (3 if by_rank else 1)
    scores = scorer.replay(states, groups, complete=True)
    advantage = torch.ones(len(states), dtype=torch.float64)
    for index in (micro for group in groups for micro in group):
        outcome = scorer.surrogate(states, index, scores, advantage, weight=1.0)
        assert torch.equal(outcome.ratio, torch.ones_like(outcome.ratio))
        outcome.loss.backward()


def test_first_ratio_is_one_to_rounding_with_other_micro_batches() -> None:
    denoiser = small_denoiser(lora=True)
    states = states_of(sample(denoiser, [5, 3, 9, 1, 4]))
    scorer = Scorer(denoiser, ALGORITHM, GENERATION)
    scores = scorer.replay(states, states.micro_batches(15, ranks=None), complete=False)
    advantage = torch.ones(len(states), dtype=torch.float64)
    for index in states.micro_batches(2, ranks=None)[0]:
        outcome = scorer.surrogate(states, index, scores, advantage, weight=1.0)
        torch.testing.assert_close(outcome.ratio, torch.ones_like(outcome.ratio), rtol=0, atol=1e-5)


def test_replay_agrees_with_the_rollout() -> None:
    denoiser = small_denoiser()
    trajectory = sample(denoiser, [5, 3, 9, 1, 4])
    selected = torch.arange(trajectory.num_steps).expand(len(trajectory), -1)
    states = States.from_selection(trajectory, selected)
    scorer = Scorer(denoiser, ALGORITHM, GENERATION)
    scores = scorer.replay(states, states.micro_batches(7, ranks=None), complete=False)
    recorded = trajectory.log_prob[states.row, states.step].double()
    torch.testing.assert_close(scores.old_log_prob, recorded, rtol=0, atol=1e-5)


def test_ratio_temperature_one_scores_at_one() -> None:
    denoiser = small_denoiser()
    states = states_of(sample(denoiser, [4, 4]))
    groups = states.micro_batches(8, ranks=None)
    at_one = Scorer(denoiser, replace(ALGORITHM, ratio_temperature="one"), GENERATION)
    plain = Scorer(denoiser, ALGORITHM, replace(GENERATION, temperature=1.0))
    a, b = (s.replay(states, groups, complete=False).old_log_prob for s in (at_one, plain))
    assert torch.equal(a, b)
    other = (
        Scorer(denoiser, ALGORITHM, GENERATION).replay(states, groups, complete=False).old_log_prob
    )
    assert not torch.allclose(a, other)


@pytest.mark.parametrize("lengths", [[4], [4, 9], [1, 4, 7, 2, 9, 3]])
def test_prompts_are_the_same_alone_and_in_any_batch(lengths: list[int]) -> None:
    denoiser = small_denoiser()
    together = sample(denoiser, lengths)
    for row, length in enumerate(lengths):
        prompt = PromptBatch(
            together.prompts.ids[row : row + 1, -length:],
            together.prompts.mask[row : row + 1, -length:],
        )
        alone = rollout(denoiser, prompt, GENERATION, seed=5, sequence_ids=torch.tensor([row]))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.unmask_step[0], together.unmask_step[row])
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.entropy[0], together.entropy[row], rtol=0, atol=1e-5)


def test_greedy_one_step_completions() -> None:
    denoiser = small_denoiser()
    trajectory = sample(denoiser, [4, 2, 6])
    states = states_of(trajectory)
    scorer = Scorer(denoiser, ALGORITHM, GENERATION)
    scores = scorer.replay(states, states.micro_batches(5, ranks=None), complete=True)
    assert scores.completions is not None
    for m in range(len(states)):
        row, step = states.row[m : m + 1], states.step[m : m + 1]
        canvas = trajectory.canvas(row, step)
        mask = trajectory.prompts.mask[row]
        ids = torch.cat([trajectory.prompts.ids[row][:, mask[0]], canvas], dim=1)
        logits = denoiser.model(input_ids=ids).logits[:, -canvas.shape[1] :].detach()
        logits[..., MASK] = -torch.inf
        expected = torch.where(canvas == MASK, logits.argmax(-1), canvas)
        assert torch.equal(scores.completions[m], expected[0])


def gradient(denoiser: Denoiser, algorithm: AlgorithmConfig, micro: int) -> list[Tensor]:
    states = states_of(sample(denoiser, [5, 3, 9, 1, 4]))
    scorer = Scorer(denoiser, algorithm, GENERATION)
    groups = states.micro_batches(micro, ranks=None)
    scores = scorer.replay(states, groups, complete=False)
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(len(states), generator=generator, dtype=torch.float64)
    denoiser.model.zero_grad()
    for index in groups[0]:
        weight = 1 / len(states)
        scorer.surrogate(states, index, scores, advantage, weight).loss.backward()
    return [p.grad.clone() for p in denoiser.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kl", ["k3", "exact"])
def test_gradient_does_not_depend_on_micro_batches(kl: str) -> None:
    algorithm = replace(ALGORITHM, beta=0.1, kl=kl)
    denoiser = small_denoiser(lora=True)
    whole, split = (gradient(denoiser, algorithm, micro) for micro in (15, 4))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl", ["k3", "exact"])
def test_reference_by_adapter_and_by_copy_agree(kl: str) -> None:
    """The KL of an adapter against the model without it, and against a frozen copy of that."""
    algorithm = replace(ALGORITHM, beta=0.1, kl=kl)
    adapted = small_denoiser(lora=True)
    copied = Denoiser(
        adapted.model,
        mask_id=MASK,
        eos_id=EOS,
        pad_id=PAD,
        reference=small_denoiser().model,
    )
    states = states_of(sample(adapted, [4, 2]))
    groups = states.micro_batches(8, ranks=None)
    results = []
    for denoiser in (adapted, copied):
        scorer = Scorer(denoiser, algorithm, GENERATION)
        scores = scorer.replay(states, groups, complete=False)
        advantage = torch.ones(len(states), dtype=torch.float64)
        results.append(scorer.surrogate(states, groups[0][0], scores, advantage, 1.0))
    assert bool((results[0].kl > 1e-4).all())
    torch.testing.assert_close(results[0].kl, results[1].kl, rtol=1e-4, atol=1e-6)


def test_no_reference_to_ask() -> None:
    with pytest.raises(RuntimeError, match="neither adapters"), small_denoiser().reference():
        pass
