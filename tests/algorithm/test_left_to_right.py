"""JustGRPO: the likelihood of what was decoded from left to right, and its loss, by formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo.config import GenerationConfig
from egspo.config.presets import preset_values
from egspo.engines.reduction import merge
from egspo.rollouts.engine import rollout
from egspo.rollouts.trajectory import PromptBatch
from egspo.training.trainer import Trainer
from tests.algorithm.test_cached_policy import enumerable_denoiser
from tests.helpers.runs import RECIPE, config
from tests.helpers.toy import MASK, PROMPT, enumerate_trajectories

PRESET = preset_values("just-grpo", RECIPE)


def log_probs(model: Any, prompt: Tensor, tokens: Tensor, mask: int) -> Tensor:
    """Of every token, given what is left of it: int64 [L] to [L]; what is right of it is masked."""
    found = []
    for place, token in enumerate(tokens.tolist()):
        canvas = torch.cat([prompt, tokens[:place], torch.full_like(tokens[place:], mask)])
        logits = model(input_ids=canvas[None]).logits[0, len(prompt) + place]
        found.append(logits.index_fill(0, torch.tensor(mask), -torch.inf).log_softmax(0)[token])
    return torch.stack(found)


@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_the_likelihood_of_a_completion_is_exact(block_length: int) -> None:
    """The probabilities of all completions add up to one, and are those of the rollout."""
    denoiser = enumerable_denoiser()
    generation = GenerationConfig(
        max_new_tokens=4,
        steps=4,
        block_length=block_length,
        temperature=1.0,
        policy="left_to_right",
        early_exit=False,
    )
    prompt, model = torch.tensor(PROMPT), denoiser.model
    every = torch.cartesian_prod(*[torch.arange(MASK)] * 4)
    with torch.no_grad():
        known = {tuple(c.tolist()): float(log_probs(model, prompt, c, MASK).sum()) for c in every}
    assert sum(map(math.exp, known.values())) == pytest.approx(1, abs=1e-12)
    sampled = rollout(
        denoiser,
        PromptBatch.from_lists([PROMPT] * 64, 0),
        generation,
        seed=0,
        sequence_ids=torch.arange(64),
    )
    assert torch.equal(sampled.unmask_step, torch.arange(4, dtype=torch.int16).expand(64, 4))
    for tokens, total in zip(sampled.tokens.tolist(), sampled.log_prob.sum(1), strict=True):
        assert float(total) == pytest.approx(known[tuple(tokens)], abs=1e-9)

    def logits(canvas: list[int], start: int) -> Tensor:
        ids = torch.cat([prompt, torch.tensor(canvas)])[None]
        whole: Tensor = model(input_ids=ids).logits[0, len(prompt) :]
        return whole

    enumerated = enumerate_trajectories(denoiser, generation, logits)
    assert len(enumerated.probability) == len(every)  # a completion has one trajectory
    for tokens, chance in zip(enumerated.trajectory.tokens, enumerated.probability, strict=True):
        assert float(chance.detach().log()) == pytest.approx(
            known[tuple(tokens.tolist())], abs=1e-9
        )


@pytest.mark.parametrize("block_length", [20, 1])
def test_the_gradient_is_that_of_the_formula(tmp_path: Path, block_length: int) -> None:
    """- 1/N sum_i 1/L sum_t A_i log p(token t | tokens before it), A_i divided by the group's
    standard deviation, as its ratio is 1."""
    changes = {"generation": {"block_length": block_length, "temperature": 1.0}}
    trainer = Trainer(config(tmp_path, PRESET, changes, {"optimizer": {"max_grad_norm": 1e9}}))
    denoiser, iteration = trainer.denoiser, trainer.iteration
    model: Any = denoiser.model.double()
    found: list[Tensor] = []

    def keep(any_gradient: bool) -> bool:
        found.extend(p.grad.clone() for p in model.parameters())
        return any_gradient

    trainer.engine.reduce_gradients = keep  # type: ignore[method-assign]
    batch = iteration.produce(1, [0, 1, 2], 0)
    metrics = merge([iteration.update(batch)])
    assert metrics["updates"] == 1 and metrics["ratio/drift"] < 1e-12
    trajectory, rewards = batch.samples.trajectory, batch.samples.rewards
    fresh: Any = Trainer(config(tmp_path / "fresh", PRESET, changes)).denoiser.model.double()
    total, (count, size) = torch.zeros((), dtype=torch.float64), rewards.shape
    for row in range(len(trajectory)):
        group = rewards[row // size]
        advantage = (group[row % size] - group.mean()) / (group.std() + 1e-6)
        prompt = trajectory.prompts.ids[row][trajectory.prompts.mask[row]]
        taken = int(trajectory.steps[row])  # what early exit leaves out has no probability
        terms = log_probs(fresh, prompt, trajectory.tokens[row], denoiser.mask_id)[:taken]
        total = total - advantage * terms.sum() / trajectory.tokens.shape[1]
    (total / (count * size)).backward()  # type: ignore[no-untyped-call]
    for mine, parameter in zip(found, fresh.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-7, atol=1e-12)
