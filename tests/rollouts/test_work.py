"""FLOPs counted from sizes against those that torch counts while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from egspo.algorithm.replay import Scorer
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, GenerationConfig
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout
from egspo.rollouts.work import ModelCost, peak_memory
from tests.algorithm.test_replay import prompts_of, small_denoiser
from tests.helpers.marks import first_fast

CONFIG = GenerationConfig(max_new_tokens=16, steps=8, block_length=8, temperature=0.9)
SIZES = {"d_model": 32, "n_layers": 3, "mlp_hidden_size": 64}


def counted_denoiser(**options: Any) -> Denoiser:
    """With attention in plain products: torch does not count the fused one of CPUs."""
    denoiser = small_denoiser(**options)
    model: Any = denoiser.model
    model.set_attn_implementation("eager")
    return denoiser


@pytest.mark.parametrize("lora", first_fast([False, True]))
@pytest.mark.parametrize(
    "options",
    [{}, {"cache": "prefix"}, {"cache": "dual"}, {"guidance": 1.0}, {"threshold": 0.2}],
    ids=str,
)
def test_rollout(lora: bool, options: dict[str, Any]) -> None:
    denoiser = counted_denoiser(lora=lora, **SIZES)
    with FlopCounterMode(display=False) as counter:
        rollout(
            denoiser,
            prompts_of([9, 9, 4, 7]),
            replace(CONFIG, **options),
            seed=0,
            sequence_ids=torch.arange(4),
        )
    cost = ModelCost.of(denoiser.model)
    assert cost is not None
    assert cost.forward(denoiser.work) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.slow
def test_update(checkpointed: bool, lora: bool, cache: Any) -> None:
    """In the first layer below adapters and the last of a cache, some gradients are not needed."""
    config = replace(CONFIG, cache=cache, early_exit=False)
    denoiser = counted_denoiser(lora=lora, d_model=32, n_layers=24, mlp_hidden_size=96)
    if checkpointed:
        denoiser.model.checkpoint_activations()
    sampled = rollout(denoiser, prompts_of([9] * 4), config, seed=0, sequence_ids=torch.arange(4))
    states = States.from_selection(sampled, torch.tensor([[1, 3, 6, 7]] * 4))
    scorer = Scorer(denoiser, AlgorithmConfig(beta=0.0), config)
    groups = states.micro_batches(8, ranks=None)
    scores = scorer.replay(states, groups, complete=False)
    before = denoiser.work.copy()
    with FlopCounterMode(display=False) as counter:
        for index in groups[0]:
            outcome = scorer.surrogate(states, index, scores, torch.ones(len(states)), 1.0)
            outcome.loss.backward()  # type: ignore[no-untyped-call]
    cost = ModelCost.of(denoiser.model)
    assert cost is not None and cost.checkpointed == checkpointed
    counted = cost.training(denoiser.work - before)
    edges = lora or cache != "none"
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05 if edges else 0.02)


def test_columns_computed_at_the_published_lengths() -> None:
    """256 new tokens in blocks of 32, 128 steps, behind a prompt of 200: columns computed."""
    denoiser = small_denoiser(max_sequence_length=512)
    config = GenerationConfig(temperature=0.9, early_exit=False)
    columns = {}
    for cache in ("none", "prefix", "dual"):
        before = denoiser.work.copy()
        rollout(
            denoiser,
            prompts_of([200]),
            replace(config, cache=cache),  # type: ignore[arg-type]
            seed=0,
            sequence_ids=torch.arange(1),
        )
        columns[cache] = (denoiser.work - before).tokens
    assert columns == {"none": 58_368, "prefix": 22_080, "dual": 7_744}


def test_peak_memory_is_of_this_process() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 50e6 < before <= peak_memory(torch.device("cpu")) < 64e9
    assert int(held[0]) == 1
