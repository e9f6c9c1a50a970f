"""Completions of chat prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from egspo.config import GenerationConfig
from egspo.models.tokenization import encode_prompts
from egspo.rollouts.completion import Completion, TextDelta, TextStream, completions_of
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import RolloutBlock, check_context, rollout_blocks
from egspo.rollouts.trajectory import PromptBatch


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    config: GenerationConfig,
    *,
    seed: int = 0,
) -> list[str]:
    """Denoise one completion per prompt and decode it up to the first EOS; see :func:`stream`."""
    return [c.text for c in _in_order(stream(model, tokenizer, prompts, config, seed=seed))]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    config: GenerationConfig,
    *,
    seed: int = 0,
) -> list[Completion]:
    """The same completions with their tokens, finish reasons and step maps."""
    events = stream(model, tokenizer, prompts, config, seed=seed, step_map=True)
    return _in_order(events)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    config: GenerationConfig,
    *,
    seed: int = 0,
    skip: Container[int] = (),
    step_map: bool = False,
) -> Iterator[TextDelta | Completion]:
    """Completions as they come: the text of every block, and the whole when it has ended.

    Blocks of one completion come from left to right, and their texts add up to its text.
    Completions come in no particular order: prompts of similar length share a batch.

    Args:
        model: a masked diffusion model, with or without adapter; left in evaluation mode.
        tokenizer: with a chat template.
        prompts: chat messages.
        config: how to denoise.
        seed: key of the noise. Each prompt has its own noise, by its place in ``prompts``: its
            completion does not depend on the other prompts or on ``config.batch_size``.
        skip: places in ``prompts`` that are not answered.
        step_map: also make the step map of every completion.

    Raises:
        ValueError: if there are no prompts, one is empty or does not fit the model's context, or
            model and tokenizer do not agree on the special tokens. Raised at once, not when the
            first completion is asked for.
    """
    denoiser = Denoiser.of(model, tokenizer)
    encoded = encode_prompts(tokenizer, list(prompts))
    if not encoded:
        raise ValueError("prompts must not be empty")
    check_context(encoded, config, getattr(model.config, "max_sequence_length", None))
    places = [i for i in range(len(encoded)) if i not in skip]
    if not places:
        return iter(())
    batch = PromptBatch.from_lists([encoded[i] for i in places], denoiser.pad_id, denoiser.device)
    ids = torch.tensor(places, device=denoiser.device)
    blocks = rollout_blocks(denoiser, batch, config, seed=seed, sequence_ids=ids)
    return _events(blocks, places, tokenizer, denoiser, step_map=step_map)


def _events(
    blocks: Iterator[RolloutBlock],
    places: list[int],
    tokenizer: PreTrainedTokenizerBase,
    denoiser: Denoiser,
    *,
    step_map: bool,
) -> Iterator[TextDelta | Completion]:
    """What each block brought; row r of the rollout is the prompt at ``places[r]``."""
    streams: dict[int, TextStream] = defaultdict(
        lambda: TextStream(tokenizer, denoiser.mask_id, denoiser.eos_id)
    )
    for block in blocks:
        tokens = block.trajectory.tokens[block.rows].tolist()
        for row, canvas in zip(block.rows, tokens, strict=True):
            text = streams[row].advance(canvas)
            if text:
                yield TextDelta(places[row], text)
        for row in block.finished:
            del streams[row]
        yield from completions_of(
            block.ended,
            tokenizer,
            denoiser.eos_id,
            indices=[places[row] for row in block.finished],
            step_map=step_map,
        )


def _in_order(events: Iterator[TextDelta | Completion]) -> list[Completion]:
    completions = [event for event in events if isinstance(event, Completion)]
    return sorted(completions, key=lambda completion: completion.index)
