"""One-step mean-field GRPO: its gradient is that of its formula, written here token by token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from egspo.algorithm.batch import Batch, Samples
from egspo.algorithm.iteration import Iteration
from egspo.engines.reduction import merge
from egspo.training.trainer import Trainer
from tests.helpers.runs import config

UPDATES = 3
OPTIONS: dict[str, Any] = {
    "micro_batch_size": 3,  # so that a group of four is split
    "algorithm": {
        "objective": "mean_field",
        "stepwise": False,
        "ratio_temperature": "one",
        "num_iterations": UPDATES,
        "clip_low": 0.02,
        "clip_high": 0.03,
    },
}


def one_iteration(
    folder: Path, *, equal: bool = False
) -> tuple[Iteration, Batch, nn.Module, list[nn.Module], dict[str, Any]]:
    """The batch, the model before it, the models (with gradients) before its updates."""
    trainer = Trainer(config(folder, OPTIONS))
    model, seen, iteration = trainer.denoiser.model, [], trainer.iteration
    before = copy.deepcopy(model)

    def reduce_gradients(any_gradient: bool) -> bool:
        seen.append(copy.deepcopy(model))
        for mine, kept in zip(model.parameters(), seen[-1].parameters(), strict=True):
            kept.grad = None if mine.grad is None else mine.grad.clone()
        return any_gradient

    trainer.engine.reduce_gradients = reduce_gradients  # type: ignore[method-assign]
    if equal:
        select = iteration.objective.select

        def select_equal(samples: Samples) -> Any:
            samples.rewards.zero_()
            return select(samples)

        iteration.objective.select = select_equal  # type: ignore[method-assign]
    batch = iteration.produce(1, [0, 1, 2], 0)
    return iteration, batch, before, seen, merge([iteration.update(batch)])


def loss_by_formula(
    iteration: Iteration, batch: Batch, update: int, old_model: nn.Module, model: nn.Module
) -> Tensor:
    """A completion at a time and a token at a time, from logits alone."""
    trajectory, denoiser, states = batch.samples.trajectory, iteration.denoiser, batch.states
    place = {
        (sequence, rank): row
        for row, (sequence, rank) in enumerate(
            zip(batch.selection.sequence_of_states(), states.rank.tolist(), strict=True)
        )
    }
    size = iteration.config.algorithm.group_size
    total, tokens = torch.zeros(()), 0
    for row in range(len(trajectory)):
        group = batch.samples.rewards[row // size]
        advantage = float(group[row % size] - group.mean())
        completion = trajectory.tokens[row].tolist()
        end = completion.index(denoiser.eos_id) + 1 if denoiser.eos_id in completion else None
        tokens += len(completion[:end])
        if (row, update) not in place:
            continue
        prompt = states.trajectory.prompts.ids[place[row, update]]
        shown = trajectory.prompts.mask[row]
        assert ((prompt == trajectory.prompts.ids[row]) | (prompt == denoiser.mask_id)).all()
        canvas = torch.cat([prompt, torch.full((len(completion),), denoiser.mask_id)])
        attention = torch.cat([shown, torch.ones(len(completion), dtype=torch.bool)])
        inputs = {"input_ids": canvas[None], "attention_mask": attention[None]}
        places = range(len(prompt), len(canvas))

        def log_probs(one: nn.Module, inputs: Any = inputs, places: Any = places) -> Tensor:
            logits = one(**inputs).logits[0, places]
            banned = torch.tensor([denoiser.mask_id])
            return logits.index_fill(1, banned, -torch.inf).log_softmax(1)

        new = log_probs(model)
        with torch.no_grad():
            old = log_probs(old_model)
        for position, token in enumerate(completion[:end]):
            ratio = (new[position, token] - old[position, token]).exp()
            clipped = ratio.clamp(1 - 0.02, 1 + 0.03)
            total = total - torch.minimum(ratio * advantage, clipped * advantage)
    return total / tokens


def test_the_gradient_is_that_of_the_formula(tmp_path: Path) -> None:
    iteration, batch, before, seen, metrics = one_iteration(tmp_path)
    assert len(seen) == metrics["updates"] == UPDATES
    assert metrics["clip/low"] > 0 and metrics["clip/high"] > 0  # the later updates are clipped
    for update, model in enumerate(seen):
        found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        loss_by_formula(iteration, batch, update, before, model).backward()  # type: ignore[no-untyped-call]
        for mine, parameter in zip(found, model.parameters(), strict=True):
            assert parameter.grad is not None and mine is not None
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)
    assert any(float(p.grad.abs().max()) > 1e-3 for p in seen[0].parameters())  # type: ignore[union-attr]


def test_the_first_ratio_is_one_under_the_same_mask(tmp_path: Path) -> None:
    *_, metrics = one_iteration(tmp_path)
    assert metrics["ratio/drift"] == 0.0
    assert metrics["ratio/max"] > 1.0


def test_flops_are_those_of_the_passes(tmp_path: Path) -> None:
    iteration, batch, *_, metrics = one_iteration(tmp_path)
    cost = iteration.phase.cost
    assert cost is not None
    length = batch.samples.trajectory.tokens.shape[1]
    width = batch.samples.trajectory.prompts.ids.shape[1] + length
    passes = len(batch.states) * width
    scored = int((batch.states.trajectory.unmask_step == 0).sum())
    forward = passes * cost.per_token + passes * width * cost.per_pair + scored * cost.per_head_row
    assert metrics["flops/score"] == forward
    backward = passes * cost.per_token_backward + passes * width * cost.per_pair * 5 // 2
    # The head's product is made again in the backward pass, beside those of the two gradients.
    assert metrics["flops/update"] == forward + backward + 3 * scored * cost.per_head_row


def test_groups_with_equal_rewards_cost_nothing(tmp_path: Path) -> None:
    *_, metrics = one_iteration(tmp_path, equal=True)
    assert metrics["skipped/groups"] == 3 and metrics["updates"] == 0
    assert metrics["flops/score"] == metrics["flops/update"] == 0 < metrics["flops/rollout"]
