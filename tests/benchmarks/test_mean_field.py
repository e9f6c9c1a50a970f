"""One-step mean-field GRPO: its gradient is that of its formula, written here token by token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.algorithms.mean_field import (
    MeanFieldIteration,
    MeanFieldTrainer,
    counted_tokens,
    prompt_masks,
)
from egspo.engines.reduction import merge
from egspo.rollouts.trajectory import PromptBatch, Trajectory
from tests.helpers.runs import config

UPDATES = 3
OPTIONS: dict[str, Any] = {
    "micro_batch_size": 3,  # so that a group of four is split
    "algorithm": {
        "stepwise": False,
        "num_iterations": UPDATES,
        "clip_low": 0.02,
        "clip_high": 0.03,
    },
}


class Watched(MeanFieldIteration):
    """Keeps what it sampled, and weights and gradients before every optimizer step."""

    trajectory: Trajectory
    rewards: Tensor

    def _sampled(self, *arguments: Any) -> tuple[Trajectory, Tensor]:
        self.trajectory, self.rewards = super()._sampled(*arguments)
        return self.trajectory, self.rewards


class Equal(Watched):
    """Every reward is the same."""

    def _sampled(self, *arguments: Any) -> tuple[Trajectory, Tensor]:
        trajectory, rewards = super()._sampled(*arguments)
        return trajectory, torch.zeros_like(rewards)


def one_iteration(
    folder: Path, kind: type[Watched] = Watched
) -> tuple[Watched, nn.Module, list[nn.Module], dict[str, Any]]:
    """The iteration, the model before it, the models (with gradients) before its updates."""
    trainer = MeanFieldTrainer(config(folder, OPTIONS))
    model, seen = trainer.denoiser.model, []
    before = copy.deepcopy(model)

    def reduce_gradients(any_gradient: bool) -> bool:
        seen.append(copy.deepcopy(model))
        for mine, kept in zip(model.parameters(), seen[-1].parameters(), strict=True):
            kept.grad = None if mine.grad is None else mine.grad.clone()
        return any_gradient

    trainer.engine.reduce_gradients = reduce_gradients  # type: ignore[method-assign]
    iteration = kind(
        trainer.config, trainer.data, trainer.denoiser, trainer.engine, trainer.processes
    )
    metrics = merge([iteration.run(1, [0, 1, 2], 0)])
    return iteration, before, seen, metrics


def loss_by_formula(
    iteration: Watched, update: int, old_model: nn.Module, model: nn.Module
) -> Tensor:
    """A completion at a time and a token at a time, from logits alone."""
    trajectory, denoiser = iteration.trajectory, iteration.denoiser
    ids = torch.arange(len(trajectory))
    masks = prompt_masks(trajectory.prompts, iteration.config.seed, update, ids)
    size = iteration.config.algorithm.group_size
    total, tokens = torch.zeros(()), 0
    for row in range(len(trajectory)):
        group = iteration.rewards[row // size]
        advantage = float(group[row % size] - group.mean())
        prompt = trajectory.prompts.ids[row].clone()
        prompt[masks[row]] = denoiser.mask_id
        completion = trajectory.tokens[row].tolist()
        canvas = torch.cat([prompt, torch.full((len(completion),), denoiser.mask_id)])
        places = range(len(prompt), len(canvas))
        new = model(input_ids=canvas[None]).logits[0, places].log_softmax(1)
        with torch.no_grad():
            old = old_model(input_ids=canvas[None]).logits[0, places].log_softmax(1)
        for place, token in enumerate(completion):
            ratio = (new[place, token] - old[place, token]).exp()
            clipped = ratio.clamp(1 - 0.02, 1 + 0.03)
            total = total - torch.minimum(ratio * advantage, clipped * advantage)
            tokens += 1
            if token == denoiser.eos_id:
                break
    return total / tokens


def test_the_gradient_is_that_of_the_formula(tmp_path: Path) -> None:
    iteration, before, seen, metrics = one_iteration(tmp_path)
    assert len(seen) == metrics["updates"] == UPDATES
    assert metrics["clip/low"] > 0 and metrics["clip/high"] > 0  # the later updates are clipped
    for update, model in enumerate(seen):
        found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        loss_by_formula(iteration, update, before, model).backward()  # type: ignore[no-untyped-call]
        for mine, parameter in zip(found, model.parameters(), strict=True):
            assert parameter.grad is not None and mine is not None
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)
    assert any(float(p.grad.abs().max()) > 1e-3 for p in seen[0].parameters())  # type: ignore[union-attr]


def test_the_first_ratio_is_one_under_the_same_mask(tmp_path: Path) -> None:
    _, _, _, metrics = one_iteration(tmp_path)
    assert metrics["ratio/drift"] == 0.0
    assert metrics["ratio/max"] > 1.0


def test_prompts_are_masked_at_the_published_rate_and_anew_for_every_update() -> None:
    ids = torch.zeros(400, 100, dtype=torch.int64)
    shown = torch.ones_like(ids, dtype=torch.bool)
    shown[:, :20] = False
    first, second = (
        prompt_masks(PromptBatch(ids, shown), 3, update, torch.arange(400)) for update in (0, 1)
    )
    assert not first[:, :20].any()
    for mask in (first, second):
        assert float(mask[:, 20:].double().mean()) == pytest.approx(0.15, abs=0.01)
    assert float((first & second)[:, 20:].double().mean()) == pytest.approx(0.0225, abs=0.005)
    assert (first[0] != first[1]).any()


def test_tokens_count_up_to_the_first_eos() -> None:
    tokens = torch.tensor([[5, 9, 5, 9], [5, 5, 5, 5], [9, 9, 9, 9]])
    expected = [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert counted_tokens(tokens, eos_id=9).tolist() == expected


def test_flops_are_those_of_the_passes(tmp_path: Path) -> None:
    iteration, _, _, metrics = one_iteration(tmp_path)
    cost = iteration.cost
    assert cost is not None
    kept = len(iteration.trajectory) - 4 * metrics["skipped/groups"]
    length = iteration.trajectory.tokens.shape[1]
    width = iteration.trajectory.prompts.ids.shape[1] + length
    linear, pairs, head = (
        kept * width * cost.per_token,
        kept * width**2 * cost.per_pair,
        kept * length,
    )
    forward = linear + pairs + head * cost.per_head_row
    assert metrics["flops/score"] == UPDATES * forward
    backward = (
        kept * width * cost.per_token_backward + pairs * 5 // 2 + 2 * head * cost.per_head_row
    )
    assert metrics["flops/update"] == UPDATES * (forward + backward)


def test_groups_with_equal_rewards_cost_nothing(tmp_path: Path) -> None:
    _, _, _, metrics = one_iteration(tmp_path, Equal)
    assert metrics["skipped/groups"] == 3 and metrics["updates"] == 0
    assert metrics["flops/score"] == metrics["flops/update"] == 0 < metrics["flops/rollout"]


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("algorithm", "beta", 0.1),
        ("algorithm", "stepwise", True),
        ("algorithm", "scale_by_std", True),
        ("generation", "cache", "dual"),
        ("generation", "guidance", 1.0),
    ],
)
def test_what_it_does_not_have_is_refused(
    tmp_path: Path, section: str, option: str, value: Any
) -> None:
    trainer = MeanFieldTrainer(config(tmp_path, OPTIONS))
    setattr(getattr(trainer.config, section), option, value)
    with pytest.raises(ValueError, match=rf"needs {section}\.{option}="):
        MeanFieldIteration(
            trainer.config, trainer.data, trainer.denoiser, trainer.engine, trainer.processes
        )
