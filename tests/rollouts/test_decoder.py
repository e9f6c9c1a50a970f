"""The decoder: full attention, block caches and guidance, against each written out plainly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from egspo.rollouts.decoder import Decoder
from egspo.rollouts.trajectory import PromptBatch
from tests.algorithm.test_replay import MASK, prompts_of, small_denoiser
from tests.helpers.cached import cached_hidden

LENGTH, BLOCK = 12, 4


def canvas_of(starts: list[int], revealed: int, seed: int = 0) -> Tensor:
    """Blocks before the start full, ``revealed`` positions of the active one, the rest masked."""
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.randint(3, 20, (len(starts), LENGTH), generator=generator)
    for row, start in enumerate(starts):
        canvas[row, start + revealed :] = MASK
    return canvas


def block_starts(canvas: Tensor, starts: list[int]) -> Tensor:
    position = torch.arange(LENGTH)
    return canvas.masked_fill(position >= torch.tensor(starts)[:, None], MASK)


def windows(decoder: Decoder, prompts: PromptBatch, canvas: Tensor, starts: list[int]) -> Tensor:
    """Hidden states [B, BLOCK, D] of the active blocks."""
    context = decoder.begin_block(
        prompts,
        block_starts(canvas, starts),
        torch.tensor(starts),
        earliest=min(starts),
        padded=not bool(prompts.mask.all()),
    )
    window = decoder.window(context, canvas)
    rows = torch.arange(len(starts)).repeat_interleave(BLOCK)
    positions = torch.tensor(starts)[:, None] + torch.arange(BLOCK)
    return window.rows(rows, positions.flatten()).view(len(starts), BLOCK, -1)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("fields", [{}, {"n_heads": 4, "n_kv_heads": 2}])
@pytest.mark.parametrize("grad", [False, True])
def test_cached_hidden_states_are_those_written_out(
    cache: str, fields: dict[str, int], grad: bool
) -> None:
    """Sequences in different blocks and of different prompt lengths, in one batch."""
    denoiser = small_denoiser(**fields)
    starts, lengths = [0, 8, 4, 8], [3, 7, 5, 1]
    prompts, canvas = prompts_of(lengths), canvas_of([0, 8, 4, 8], revealed=2)
    with torch.set_grad_enabled(grad):
        actual = windows(Decoder(denoiser, BLOCK, cache), prompts, canvas, starts)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        prompt = prompts.ids[row, -length:]
        ids = torch.cat([prompt, canvas[row]])
        built = torch.cat([prompt, block_starts(canvas[row : row + 1], [start])[0]])
        end = length + (start + BLOCK if cache == "dual" else LENGTH)
        columns = torch.arange(length + start, end)
        expected = cached_hidden(denoiser.model, built, ids, columns)[:BLOCK]
        torch.testing.assert_close(actual[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_changes_the_policy_but_not_at_the_first_step(cache: str) -> None:
    denoiser, prompts = small_denoiser(), prompts_of([3, 5])
    for revealed, same in ((0, True), (2, False)):
        canvas = canvas_of([4, 4], revealed)
        full = windows(Decoder(denoiser, BLOCK), prompts, canvas, [4, 4])
        cached = windows(Decoder(denoiser, BLOCK, cache), prompts, canvas, [4, 4])
        assert torch.allclose(full, cached, rtol=0, atol=1e-5) is same


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_several_steps_share_a_cache(cache: str) -> None:
    """Overwriting the cache at the active columns leaves nothing behind."""
    denoiser, prompts, starts = small_denoiser(), prompts_of([4, 2]), [0, 4]
    decoder = Decoder(denoiser, BLOCK, cache)
    first, second = canvas_of(starts, 1), canvas_of(starts, 3)
    with torch.no_grad():
        context = decoder.begin_block(
            prompts, block_starts(first, starts), torch.tensor(starts), earliest=0, padded=True
        )
        decoder.window(context, second)
        again = decoder.window(context, first).hidden
        fresh = decoder.begin_block(
            prompts, block_starts(first, starts), torch.tensor(starts), earliest=0, padded=True
        )
        assert torch.equal(again, decoder.window(fresh, first).hidden)
        taken = decoder.window(fresh.take(torch.tensor([1, 1, 0])), first[[1, 1, 0]])
    alone = decoder.window(fresh, first)
    for row, source in enumerate([1, 1, 0]):
        torch.testing.assert_close(taken.hidden[row], alone.hidden[source], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_guidance_is_that_of_the_logits(cache: str) -> None:
    """``un + (1 + s) (cond - un)``, the second pass without the prompt, padding masked in both."""
    denoiser, prompts, starts = small_denoiser(), prompts_of([3, 6]), [4, 4]
    canvas, strength = canvas_of(starts, 2), 1.5
    guided = windows(Decoder(denoiser, BLOCK, cache, strength), prompts, canvas, starts)
    plain = Decoder(denoiser, BLOCK, cache)
    masked = PromptBatch(prompts.ids.masked_fill(prompts.mask, MASK), prompts.mask)
    conditional, unconditional = (
        denoiser.logits(windows(plain, p, canvas, starts).flatten(0, 1)) for p in (prompts, masked)
    )
    expected = unconditional + (1 + strength) * (conditional - unconditional)
    actual = denoiser.logits(guided.flatten(0, 1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(conditional, expected, atol=0.1)
    for row, length in enumerate([3, 6]):
        alone = PromptBatch.from_lists([prompts.ids[row, -length:].tolist()], 0)
        single = windows(
            Decoder(denoiser, BLOCK, cache, strength), alone, canvas[row : row + 1], [4]
        )
        torch.testing.assert_close(single[0], guided[row], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_completions_take_the_rest_from_the_pass_that_made_the_cache(cache: str) -> None:
    denoiser, prompts, starts = small_denoiser(), prompts_of([3, 3]), [0, 4]
    decoder, canvas = Decoder(denoiser, BLOCK, cache), canvas_of([0, 4], 2)
    context = decoder.begin_block(
        prompts, block_starts(canvas, starts), torch.tensor(starts), earliest=0, padded=False
    )
    window = decoder.window(context, canvas)
    completions = decoder.completions(context, window)
    for row, start in enumerate(starts):
        positions = torch.arange(start, start + BLOCK if cache == "dual" else LENGTH)
        assert torch.equal(
            completions[row, positions], window.rows(torch.full_like(positions, row), positions)
        )
        if cache == "dual":
            assert context.built is not None
            assert torch.equal(
                completions[row, start + BLOCK :], context.built[row, start + BLOCK :]
            )
