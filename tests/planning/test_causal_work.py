"""Counted passes of block-causal models, against what runs make and at published sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from egspo.config import TrainConfig
from egspo.config.convert import from_mapping
from egspo.models import LLaDAConfig, SDARConfig, model_on_meta
from egspo.planning.expected_work import Shares, expected_work
from egspo.planning.plan import PHASES, Planner
from egspo.rollouts.work import ModelCost
from egspo.runs.metrics import read_metrics
from egspo.tasks import Reward
from egspo.training.trainer import train
from tests.helpers import runs
from tests.planning.test_plan import FULL, STILL, hashed
from tests.training.test_families import recipe

pytestmark = pytest.mark.usefixtures("no_plots", "varied")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("sdar", {}),
        (
            "llada2",
            {
                "algorithm": {
                    "completion_blocks": "active",
                    "schedule": "per_step",
                    "share_prompts": "always",
                }
            },
        ),
        ("sdar_moe", {"algorithm": {"stepwise": False, "beta": 0.1}, "micro_batch_size": 3}),
    ],
    ids=range(3),
)
def test_flops_are_those_a_run_logs(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Of prompts of different lengths, all steps trained. (Batches are expected to go through their
    blocks together, and do not quite.)"""
    # Prompts of a step are taken for different ones: four are.
    every = {"algorithm": {"strategy": "all"}, "task": {"options": {"train": 4}}}
    # No reward is its group's mean: an update leaves states out whose advantage is 0.
    runs.rewards[:] = [Reward("hashed", hashed)]
    config = recipe(family, tmp_path, FULL, STILL, every, changes)
    plan = Planner(config, 1, Shares()).plan
    train(config)
    records = read_metrics(tmp_path)[1:]
    for phase in PHASES:
        logged = sum(record[f"flops/{phase}"] for record in records) / len(records)
        chains = config.algorithm.stepwise and config.algorithm.completion_blocks == "all"
        if phase == "score" and chains:  # which end with the first EOS
            assert logged <= plan.flops[phase] < 2 * logged
            continue
        tolerance = 0.1 if phase == "rollout" else 1e-6
        assert plan.flops[phase] == pytest.approx(logged, rel=tolerance), phase


def settings(**generation: Any) -> TrainConfig:
    """200 tokens of a prompt, 256 new ones in 128 steps, eight states of a trajectory."""
    tree = {
        "model": {"path": "none"},
        "prompts_per_step": 1,
        "micro_batch_size": 8,
        "generation": {"batch_size": 64, **generation},
        "algorithm": {"stepwise": False, "beta": 0.0},
    }
    return from_mapping(TrainConfig, tree, "settings")


def test_columns_of_an_iteration() -> None:
    """What the note of the method calculates: the clean prompt is shared by the group besides."""
    cost = ModelCost.of(model_on_meta(LLaDAConfig(n_layers=1)))
    assert cost is not None
    full = expected_work(settings(), [200], 0, cost)
    assert full["rollout"].tokens == 8 * 128 * 456
    assert full["update"].tokens == 8 * 8 * 456
    blocks = expected_work(settings(), [200], 0, cost, block_size=32)
    # 200 tokens leave 8 of them in the first block, and a block of 8 at the end: 9 blocks.
    steps, rides = 128, 8
    assert blocks["rollout"].tokens == 200 + 8 * (steps + rides) * 32
    ratio = full["rollout"].tokens / blocks["rollout"].tokens
    assert 13 < ratio < 14
    assert blocks["update"].tokens <= 8 * (200 + 256 + 8 * 32)
    assert full["update"].tokens / blocks["update"].tokens > 5


def test_cost_counts_active_experts_and_all_heads() -> None:
    dense = ModelCost.of(model_on_meta(SDARConfig(num_hidden_layers=1)))
    llada = ModelCost.of(model_on_meta(LLaDAConfig(n_layers=1)))
    assert dense is not None and llada is not None
    assert llada.per_token == dense.per_token + 2 * 2 * 4096 * 3 * 1024  # 32 key heads, not 8
    assert llada.per_pair == dense.per_pair
