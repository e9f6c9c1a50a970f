"""Replayed passes: recording and bookkeeping on a CPU, real CUDA graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout
from egspo.rollouts.graphs import GraphReplay
from egspo.rollouts.trajectory import PromptBatch, Trajectory
from tests.algorithm.test_replay import EOS, MASK, PAD, prompts_of, small_denoiser
from tests.families import make
from tests.rollouts.test_engine import CONFIG, LENGTHS

OPTIONS = [
    {},
    {"cache": "prefix"},
    {"cache": "dual"},
    {"cache": "dual", "guidance": 1.0, "threshold": 0.3},
]


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """As a CUDA graph does: the same work on the same tensors, into the same output."""
    output = run()
    return lambda: output.copy_(run()), output


def run(denoiser: Denoiser, graphs: bool, lengths: list[int], **options: Any) -> Trajectory:
    config = replace(CONFIG, cuda_graphs=graphs, **options)
    prompts = prompts_of(lengths)
    prompts = PromptBatch(prompts.ids.to(denoiser.device), prompts.mask.to(denoiser.device))
    ids = torch.arange(len(lengths), device=denoiser.device)
    return rollout(denoiser, prompts, config, seed=3, sequence_ids=ids)


def assert_same(a: Trajectory, b: Trajectory) -> None:
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.unmask_step, b.unmask_step)
    torch.testing.assert_close(a.log_prob, b.log_prob, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_replayed_rollouts_are_the_same(options: dict[str, Any], batch_size: int) -> None:
    denoiser = small_denoiser()
    denoiser.graphs = GraphReplay(limit=3, record=record)
    options = {**options, "batch_size": batch_size}
    expected = [run(denoiser, False, lengths, **options) for lengths in (LENGTHS, [5])]
    assert denoiser.graphs.recorded == 0
    for _ in range(2):
        for lengths, eager in zip((LENGTHS, [5]), expected, strict=True):
            with denoiser.graphed():
                assert_same(run(denoiser, False, lengths, **options), eager)
    assert denoiser.graphs.recorded >= 2
    assert len(denoiser.graphs) <= 3


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_replayed_rollouts_of_a_block_causal_model_are_the_same(threshold: float | None) -> None:
    """What rides with the first step of a block writes the cache, and is not replayed."""
    # Prompts hold no mask: one there would make scores tie, and rounding decide.
    model = make("sdar", max_position_embeddings=256, mask_token_id=MASK)
    denoiser = Denoiser(model, mask_id=MASK, eos_id=EOS, pad_id=PAD)
    denoiser.graphs = GraphReplay(limit=8, record=record)
    options = {"batch_size": 2, "threshold": threshold, "early_exit": False}
    expected = run(denoiser, False, LENGTHS, **options)
    for _ in range(2):
        with denoiser.graphed():
            replayed = run(denoiser, False, LENGTHS, **options)
        assert torch.equal(replayed.tokens, expected.tokens)
        # Keys beside the block are masked, and not left out as they are without graphs.
        torch.testing.assert_close(replayed.log_prob, expected.log_prob, rtol=0, atol=1e-5)
    assert denoiser.graphs.recorded >= 1


def test_a_shape_is_recorded_the_second_time_and_the_oldest_is_dropped() -> None:
    calls: list[tuple[int, ...]] = []

    def double(inputs: dict[str, Tensor | None], cache: object) -> Tensor:
        assert inputs["x"] is not None
        calls.append(tuple(inputs["x"].shape))
        return 2 * inputs["x"]

    graphs = GraphReplay(limit=2, record=record)

    def ask(size: int, value: float = 1.0) -> list[float]:
        return graphs.run(double, {"x": torch.full((size,), value)}, None).tolist()

    assert ask(1) == [2.0] and graphs.recorded == 0
    assert ask(1, 3.0) == [6.0] and graphs.recorded == 1
    assert ask(1, 4.0) == [8.0] and graphs.recorded == 1
    for size in (2, 2, 3, 3):
        ask(size)
    assert len(graphs) == 2 and graphs.recorded == 3
    ask(1)  # was dropped: eager, then recorded again
    assert graphs.recorded == 3
    ask(1)
    assert graphs.recorded == 4


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"generation.cuda_graphs needs a GPU.*'cpu'"):
        run(small_denoiser(), True, [5])


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_cuda_graphs_give_the_eager_tokens(
    options: dict[str, Any], autocast: torch.dtype | None
) -> None:
    small = small_denoiser()
    tokens = {"mask_id": small.mask_id, "eos_id": small.eos_id, "pad_id": small.pad_id}
    denoiser = Denoiser(small.model.cuda(), **tokens, autocast=autocast)
    for lengths in ([5] * 6, LENGTHS):
        eager = run(denoiser, False, lengths, **options)
        for _ in range(3):
            assert_same(run(denoiser, True, lengths, **options), eager)
    assert 1 <= len(denoiser.graphs) <= denoiser.graphs.limit
    with torch.no_grad():  # graphs read the weights where they are
        for parameter in denoiser.model.parameters():
            parameter.mul_(0.5)
    eager = run(denoiser, False, [5] * 6, **options)
    assert_same(run(denoiser, True, [5] * 6, **options), eager)
