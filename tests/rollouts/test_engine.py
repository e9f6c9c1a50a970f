"""The queue, retiring, threshold decoding, memory: nothing of it changes a sequence."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from egspo.config import GenerationConfig
from egspo.rollouts.block import BlockDenoising, block_plan
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout, rollout_blocks
from egspo.rollouts.trajectory import NEVER, PromptBatch, Trajectory
from tests.algorithm.test_replay import EOS, MASK, PAD, prompts_of, small_denoiser
from tests.helpers.toy import toy_denoiser

CONFIG = GenerationConfig(
    max_new_tokens=12, steps=6, block_length=4, temperature=0.9, batch_size=64
)
LENGTHS = [3, 9, 1, 9, 4, 4, 20, 9, 2, 52]


def run(config: GenerationConfig, lengths: list[int], denoiser: Denoiser, **options) -> Trajectory:
    ids = options.pop("ids", None)
    ids = torch.arange(len(lengths)) if ids is None else ids
    prompts = options.pop("prompts", None) or prompts_of(lengths)
    return rollout(denoiser, prompts, config, seed=7, sequence_ids=ids, **options)


def differing(a: Trajectory, b: Trajectory, atol: float = 1e-5) -> int:
    """Sequences whose tokens differ; those of all others agree in log-probability to ``atol``."""
    same = (a.tokens == b.tokens).all(1) & (a.unmask_step == b.unmask_step).all(1)
    torch.testing.assert_close(a.log_prob[same], b.log_prob[same], rtol=0, atol=atol)
    torch.testing.assert_close(a.entropy[same], b.entropy[same], rtol=0, atol=atol, equal_nan=True)
    return int((~same).sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache": "prefix"},
        {"cache": "dual"},
        {"guidance": 0.5},
        {"threshold": 0.3},
        {"threshold": 0.3, "cache": "dual", "policy": "margin"},
        {"threshold": 0.3, "cache": "prefix", "guidance": 1.0},
    ],
    ids=str,
)
def test_alone_in_any_batch_and_in_any_order(options: dict[str, Any]) -> None:
    config, denoiser = replace(CONFIG, **options), small_denoiser()
    prompts = prompts_of(LENGTHS)
    together = run(config, LENGTHS, denoiser)
    ties = 0
    for size in (1, 2, 3):
        ties += differing(together, run(replace(config, batch_size=size), LENGTHS, denoiser))
    order = torch.tensor([4, 9, 0, 3, 8, 1, 7, 2, 6, 5])
    shuffled = PromptBatch(prompts.ids[order], prompts.mask[order])
    again = run(config, LENGTHS, denoiser, prompts=shuffled, ids=order)
    ties += differing(together.take(order), again)
    # A tie within the rounding of the matrix library may fall either way.
    assert ties <= 1
    assert len({tuple(row) for row in together.tokens.tolist()}) == len(LENGTHS)


def test_bfloat16_differs_between_batch_shapes_by_its_rounding_only() -> None:
    denoiser = small_denoiser()
    denoiser.model.to(torch.bfloat16)
    together = run(CONFIG, LENGTHS, denoiser)
    alone = run(replace(CONFIG, batch_size=1), LENGTHS, denoiser)
    # Two tokens of log-probabilities of about -3 from logits of 8 bits.
    assert differing(together, alone, atol=0.1) <= len(LENGTHS) // 2


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_early_exit_keeps_the_text_and_saves_forwards(cache: Any) -> None:
    denoiser = small_denoiser(init_std=1.0)
    lengths = [5] * 40
    early = run(replace(CONFIG, cache=cache), lengths, denoiser)
    saved = denoiser.work.copy()
    late = run(replace(CONFIG, cache=cache, early_exit=False), lengths, denoiser)
    full = denoiser.work - saved
    assert torch.equal(early.lengths, late.lengths)
    assert late.steps.tolist() == [6] * 40
    retired = early.steps < 6
    assert 0 < int(retired.sum()) < 40
    assert saved.sequences < full.sequences and saved.tokens < full.tokens
    for row in range(40):
        end = int(early.steps[row]) * 2
        assert torch.equal(early.tokens[row, :end], late.tokens[row, :end])
        assert bool((early.tokens[row, end:] == EOS).all())
        assert bool((early.unmask_step[row, end:] == NEVER).all())
        if end < 12:
            assert EOS in early.tokens[row, end - 4 : end].tolist()
            assert EOS not in early.tokens[row, : end - 4].tolist()
        assert bool(early.entropy[row, end // 2 :].isnan().all())
        assert bool((early.log_prob[row, end // 2 :] == 0).all())
        assert bool(early.confidence[row, end:].isnan().all())
        state = early.canvas(torch.tensor([row]), torch.tensor([int(early.steps[row])]))
        assert bool((state[0, end:] == MASK).all())


def test_retired_sequences_are_replaced_from_the_queue() -> None:
    denoiser = small_denoiser(init_std=1.0)
    run(replace(CONFIG, batch_size=8), [5] * 100, denoiser)
    full_batches = -(-denoiser.work.sequences // 8)
    assert denoiser.work.forwards <= full_batches + 4
    # Without refilling it would be one batch after the other, each as long as its longest.
    waiting = small_denoiser(init_std=1.0)
    for first in range(0, 100, 8):
        ids = torch.arange(first, min(first + 8, 100))
        every = prompts_of([5] * 100)
        prompts = PromptBatch(every.ids[ids], every.mask[ids])
        run(CONFIG, [5] * len(ids), waiting, prompts=prompts, ids=ids)
    assert denoiser.work.forwards < waiting.work.forwards


def test_padding_is_bounded() -> None:
    denoiser = small_denoiser()
    config = replace(CONFIG, early_exit=False)
    run(config, LENGTHS, denoiser)
    needed = config.steps * sum(length + 12 for length in LENGTHS)
    assert needed <= denoiser.work.tokens <= needed * 8 / 7


def test_head_runs_on_masked_rows_of_active_blocks_only() -> None:
    denoiser = small_denoiser()
    run(replace(CONFIG, early_exit=False), [5] * 3, denoiser)
    assert denoiser.work.head_rows == 3 * 3 * (4 + 2)
    denoiser = small_denoiser()
    sampled = run(replace(CONFIG, early_exit=False, threshold=0.2), [5] * 3, denoiser)
    masked = sum(
        int((sampled.unmask_step[row, block : block + 4] >= step).sum())
        for row in range(3)
        for block in (0, 4, 8)
        for step in sampled.unmask_step[row, block : block + 4].unique().tolist()
    )
    assert denoiser.work.head_rows == masked


@pytest.mark.parametrize("policy", ["max_prob", "margin", "low_confidence"])
@pytest.mark.parametrize("most", [None, 2, 3])
def test_threshold(policy: Any, most: int | None) -> None:
    """Every step reveals the positions above the threshold, within its least and its most."""
    config = replace(
        CONFIG, policy=policy, steps=12, threshold=0.25, max_tokens_per_step=most, early_exit=False
    )
    denoiser = small_denoiser()
    sampled = run(config, [4] * 60, denoiser)
    assert 3 <= int(sampled.steps.min()) < int(sampled.steps.max()) <= 12
    counts = []
    for row in range(60):
        taken = int(sampled.steps[row])
        assert sampled.unmask_step[row].unique().tolist() == list(range(taken))
        counts += [int((sampled.unmask_step[row] == step).sum()) for step in range(taken)]
        assert bool(sampled.entropy[row, :taken].isfinite().all())
        assert bool(sampled.entropy[row, taken:].isnan().all())
    assert min(counts) == 1 and 1 < max(counts) <= (most or 4)
    if policy == "low_confidence":
        # The score is the recorded confidence: all but the best of a step reach the threshold.
        for row in range(60):
            for step in range(int(sampled.steps[row])):
                mine = sampled.unmask_step[row] == step
                best = sampled.confidence[row, mine].sort(descending=True).values
                assert bool((best[1:] >= 0.25).all())


def test_threshold_of_one_is_the_quota() -> None:
    denoiser = small_denoiser()
    plain = run(CONFIG, LENGTHS, denoiser)
    assert differing(plain, run(replace(CONFIG, threshold=1.0), LENGTHS, denoiser)) == 0


class _LimitedMemory:
    """A model that runs out of memory beyond ``limit`` sequences."""

    def __init__(self, denoiser: Denoiser, limit: int) -> None:
        self.denoiser, self.limit, self.forward = denoiser, limit, denoiser.model.forward

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        if input_ids.shape[0] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.forward(input_ids=input_ids, **options)


@pytest.mark.parametrize("options", [{}, {"cache": "dual"}, {"threshold": 0.3}], ids=str)
def test_out_of_memory_splits_the_batch(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, denoiser = replace(CONFIG, **options), small_denoiser()
    expected = run(config, [5] * 20, denoiser)
    monkeypatch.setattr(denoiser.model, "forward", _LimitedMemory(denoiser, 6))
    with caplog.at_level(logging.WARNING, "egspo"):
        actual = run(config, [5] * 20, denoiser)
    assert differing(expected, actual) == 0
    messages = [record.getMessage() for record in caplog.records]
    assert any("20 sequences" in m and "going on with 10" in m for m in messages)
    assert any("going on with 5" in m for m in messages) and len(messages) == 2
    monkeypatch.setattr(denoiser.model, "forward", _LimitedMemory(denoiser, 0))
    with pytest.raises(torch.OutOfMemoryError):
        run(config, [5], denoiser)


def test_blocks_come_one_by_one_with_who_retired() -> None:
    denoiser, config = small_denoiser(init_std=1.0), replace(CONFIG, batch_size=4)
    prompts, ids = prompts_of([5] * 10), torch.arange(10)
    seen: list[int] = []
    masks = []
    for block in rollout_blocks(denoiser, prompts, config, seed=7, sequence_ids=ids):
        assert len(block.rows) <= 4 and set(block.finished) <= set(block.rows)
        seen += block.finished
        masks.append(int((block.trajectory.tokens == MASK).sum()))
        assert not bool((block.trajectory.tokens[block.finished] == MASK).any())
    assert sorted(seen) == list(range(10))
    assert masks == sorted(masks, reverse=True) and masks[-1] == 0
    assert torch.equal(block.trajectory.tokens, run(config, [5] * 10, denoiser).tokens)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_invariants(data: st.DataObject) -> None:
    block = data.draw(st.integers(1, 3), "block_length")
    blocks = data.draw(st.integers(1, 6 // block), "blocks")
    per_block = data.draw(st.integers(1, block), "steps per block")
    least = -(-block // per_block)
    threshold = data.draw(st.one_of(st.none(), st.floats(0.05, 1.0)), "threshold")
    most = None
    if threshold is not None:
        most = data.draw(st.one_of(st.none(), st.integers(least, block)), "max_tokens_per_step")
    config = GenerationConfig(
        max_new_tokens=block * blocks,
        steps=per_block * blocks,
        block_length=block,
        temperature=data.draw(st.sampled_from([0.0, 0.7, 2.0]), "temperature"),
        policy=data.draw(st.sampled_from(["max_prob", "margin", "low_confidence"]), "policy"),
        threshold=threshold,
        max_tokens_per_step=most,
        early_exit=data.draw(st.booleans(), "early_exit"),
        batch_size=data.draw(st.integers(1, 8), "batch_size"),
    )
    denoiser = toy_denoiser(config.max_new_tokens, seed=data.draw(st.integers(0, 5), "model"))
    eos = data.draw(st.sampled_from([-50.0, 0.0, 50.0]), "eos")
    with torch.no_grad():
        denoiser.model.table[..., denoiser.eos_id] += eos
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=7), "prompts")
    prompts = PromptBatch.from_lists([[0] * n for n in lengths], PAD)
    ids = torch.arange(len(lengths))
    sampled = rollout(denoiser, prompts, config, seed=1, sequence_ids=ids)

    plan = block_plan(config)
    for row in range(len(lengths)):
        when, taken = sampled.unmask_step[row], int(sampled.steps[row])
        revealed = when != NEVER
        end = int(revealed.sum())
        assert bool(revealed[:end].all()) and end % block == 0
        assert when[:end].unique().tolist() == list(range(taken)) and taken <= config.steps
        assert end == config.max_new_tokens or config.early_exit
        assert not bool((sampled.tokens[row] == denoiser.mask_id).any())
        text = sampled.tokens[row, : int(sampled.lengths[row])]
        assert not bool((text == denoiser.eos_id).any())
        if config.early_exit:
            assert end == min(
                config.max_new_tokens, int(sampled.lengths[row]) // block * block + block
            )
        for start in range(0, end, block):
            steps = when[start : start + block]
            counts = [int((steps == s).sum()) for s in steps.unique().tolist()]
            for count, step in zip(counts[:-1], plan, strict=False):
                assert step.quota <= count <= (most or block)
        assert bool(sampled.entropy[row, :taken].isfinite().all())
        assert bool(sampled.log_prob[row].isfinite().all())
    if eos == 50.0:
        assert sampled.lengths.tolist() == [0] * len(lengths)
        assert not config.early_exit or sampled.steps.tolist() == [
            int((sampled.unmask_step[row] != NEVER).sum() > 0)
            * len(sampled.unmask_step[row, :block].unique())
            for row in range(len(lengths))
        ]
    if eos == -50.0:
        assert sampled.lengths.tolist() == [config.max_new_tokens] * len(lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cache": "dual"}, {"guidance": 1.0}], ids=str)
def test_no_step_waits_for_the_gpu(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any synchronisation inside a step is an error."""
    denoiser = small_denoiser()
    denoiser.model.cuda()
    prompts = prompts_of([5, 5, 3])
    prompts = PromptBatch(prompts.ids.cuda(), prompts.mask.cuda())
    ids = torch.arange(3, device="cuda")
    config = replace(CONFIG, **options)
    rollout(denoiser, prompts, config, seed=0, sequence_ids=ids)  # what is made once
    advance = BlockDenoising._advance

    def strict(self: BlockDenoising, *arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(BlockDenoising, "_advance", strict)
    rollout(denoiser, prompts, config, seed=1, sequence_ids=ids)
