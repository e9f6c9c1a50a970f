"""One-step completions of the rollout's passes, and where they are cheaper than a replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from egspo.algorithm.one_step import cheaper_source, extra_work
from egspo.algorithm.replay import Scorer
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, GenerationConfig, ModelConfig, TrainConfig
from egspo.rollouts.engine import rollout_blocks
from egspo.rollouts.work import ModelCost
from tests.algorithm.test_micro_batches import LORA, SMALL, FirstStep, assert_same
from tests.algorithm.test_replay import prompts_of, small_denoiser
from tests.helpers import runs

pytestmark = pytest.mark.usefixtures("no_plots", "varied")

GENERATION = GenerationConfig(max_new_tokens=12, steps=6, block_length=4, temperature=0.9)


@pytest.mark.parametrize("entropy_over", ["revealed", "masked"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"cache": "prefix"}, {"cache": "dual"}, {"guidance": 0.5}, {"threshold": 0.1}],
    ids=str,
)
def test_the_rollout_completes_as_a_replay_does(changes: Any, entropy_over: Any) -> None:
    """Every step of every trajectory; early exit leaves some out."""
    if entropy_over == "masked" and changes.get("cache") == "dual":
        pytest.skip("its steps do not compute later blocks")
    config = replace(GENERATION, **changes)
    denoiser = small_denoiser()
    for block in rollout_blocks(  # noqa: B007 - the last one counts
        denoiser,
        prompts_of([5, 2, 5, 3]),
        config,
        seed=1,
        sequence_ids=torch.arange(4),
        entropy_over=entropy_over,
        complete=True,
    ):
        pass
    sampled = block.trajectory
    steps = torch.arange(config.steps)
    states = States.from_selection(sampled, steps.where(steps < sampled.steps[:, None], -1))
    scorer = Scorer(denoiser, AlgorithmConfig(beta=0.0), config)
    scores = scorer.replay(states, states.micro_batches(100, ranks=None), complete=True)
    completions = sampled.one_step_completions(states.row, states.step)
    assert scores.completions is not None and len(completions) > 5
    assert torch.equal(completions, scores.completions)
    assert not (completions == denoiser.mask_id).any()


def config_of(generation: GenerationConfig, **algorithm: Any) -> TrainConfig:
    return TrainConfig(
        ModelConfig(config={}), generation=generation, algorithm=AlgorithmConfig(**algorithm)
    )


def test_the_cheaper_of_the_two_by_sizes() -> None:
    """LLaDA-8B: 1.4 GFLOP a row of the head, 15.2 a token of a pass."""
    llada = ModelCost(int(14.2e9), 0, 0, int(1.04e9), 8192, False, False, 0)
    for steps in (32, 128):
        published = config_of(GenerationConfig(steps=steps))
        assert cheaper_source(published, llada, 200, 0) == "rollout"
        rollout, replay = extra_work(published, 200, 0)
        assert rollout.head_rows == sum(256 - 32 * (b + 1) for b in range(8)) * steps // 8
        assert replay.tokens == 8 * 456
        again = config_of(GenerationConfig(steps=steps), num_iterations=2)
        assert cheaper_source(again, llada, 200, 0) == "replay"  # which is made anyway
        assert extra_work(again, 200, 0)[1].tokens == 0
    one_block = config_of(GenerationConfig(block_length=256), num_iterations=2)
    assert cheaper_source(one_block, llada, 200, 0) == "rollout"  # which has all rows anyway
    dual = config_of(GenerationConfig(cache="dual"))
    assert extra_work(dual, 200, 0)[0].head_rows == 32 * 28  # once a block
    for asked in ("rollout", "replay"):
        named = config_of(GenerationConfig(), one_step=asked)
        assert cheaper_source(named, llada, 200, 0) == asked


@pytest.mark.parametrize("schedule", ["joint", "per_step"])
def test_both_sources_give_one_gradient(schedule: str, tmp_path: Path) -> None:
    gradients, flops = [], []
    for source in ("rollout", "replay"):
        changes = {"algorithm": {"one_step": source, "schedule": schedule, "beta": 0.1}}
        step = FirstStep(runs.config(tmp_path, SMALL, changes, LORA))
        metrics = step.run()
        gradients.append(step.gradients)
        flops.append(metrics["flops/score"].value)
    assert_same(*gradients)
    assert flops[0] < flops[1]


def test_without_a_record_it_is_an_error() -> None:
    denoiser = small_denoiser()
    for block in rollout_blocks(  # noqa: B007
        denoiser, prompts_of([2]), GENERATION, seed=1, sequence_ids=torch.arange(1)
    ):
        pass
    with pytest.raises(ValueError, match="did not record one-step completions"):
        block.trajectory.one_step_completions(torch.zeros(1).long(), torch.zeros(1).long())
