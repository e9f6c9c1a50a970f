"""Completions of chat prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from egspo.config import GenerationConfig
from egspo.denoiser import Denoiser
from egspo.models.loading import special_token_ids
from egspo.rollout import rollout
from egspo.tokenization import decode_completions, encode_prompts
from egspo.trajectory import PromptBatch

GENERATION_FILE = "egspo_generation.json"


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    config: GenerationConfig,
    *,
    seed: int = 0,
) -> list[str]:
    """Denoise one completion per prompt and decode it up to the first EOS.

    Args:
        model: a masked diffusion model, with or without adapter; left in evaluation mode.
        tokenizer: with a chat template.
        prompts: chat messages.
        config: how to denoise.
        seed: key of the noise. Each prompt has its own noise, by its place in ``prompts``: its
            completion does not depend on the other prompts or on ``config.batch_size``.

    Raises:
        ValueError: if there are no prompts, one is empty or does not fit the model's context, or
            model and tokenizer do not agree on the special tokens.
    """
    tokens = special_token_ids(tokenizer, model.config)
    denoiser = Denoiser(model, mask_id=tokens.mask, eos_id=tokens.eos, pad_id=tokens.pad)
    encoded = encode_prompts(tokenizer, list(prompts))
    check_context(encoded, config, getattr(model.config, "max_sequence_length", None))
    trajectory = rollout(
        denoiser,
        PromptBatch.from_lists(encoded, denoiser.pad_id, denoiser.device),
        config,
        seed=seed,
        sequence_ids=torch.arange(len(encoded), device=denoiser.device),
    )
    return decode_completions(tokenizer, trajectory.tokens.tolist(), tokens.eos)


def check_context(
    prompts: Sequence[Sequence[int]], config: GenerationConfig, context: int | None
) -> None:
    """Every prompt and its completion must fit the model's context; names the longest if not."""
    if context is None or not prompts:
        return
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    total = len(prompts[longest]) + config.max_new_tokens
    if total > context:
        raise ValueError(
            f"prompt {longest} has {len(prompts[longest])} tokens and "
            f"generation.max_new_tokens is {config.max_new_tokens}: {total} tokens do not fit the "
            f"model's context of {context}"
        )


def save_generation_config(config: GenerationConfig, folder: Path) -> None:
    """Keep beside the weights how the model was trained to be decoded."""
    (folder / GENERATION_FILE).write_text(json.dumps(asdict(config), indent=1))
