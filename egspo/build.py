"""From a configuration to the parts of a run: tokenizer, task, model, prompts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from egspo.config import ModelConfig, TaskConfig, TrainConfig
from egspo.denoiser import Denoiser
from egspo.evaluation import PromptSet
from egspo.generation import check_context
from egspo.models import add_lora, load_adapter, load_model, load_tokenizer, new_model
from egspo.models.loading import special_token_ids
from egspo.tasks import Task, build_task
from egspo.tokenization import character_tokenizer, encode_prompts


@dataclass(frozen=True)
class Data:
    """The task, and its prompts as tokens."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    train: PromptSet
    test: PromptSet


def build_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer named in the recipe, the checkpoint's, or the character tokenizer."""
    source = config.tokenizer or config.path
    return character_tokenizer() if source is None else load_tokenizer(source)


def build_data(config: TrainConfig) -> Data:
    """Task and tokenised prompts; every prompt is tokenised now, so that a bad one fails now."""
    tokenizer = build_tokenizer(config.model)
    task = weighted_task(build_task(config.task.name, **config.task.options), config.task)
    train, test = (
        PromptSet(examples, encode_prompts(tokenizer, [example.prompt for example in examples]))
        for examples in (task.train, task.test[: config.eval.examples])
    )
    return Data(task, tokenizer, train, test)


def weighted_task(task: Task, config: TaskConfig) -> Task:
    """``task`` with the reward weights of the recipe; an unknown reward name raises ValueError."""
    names = [reward.name for reward in task.rewards]
    for name in config.reward_weights:
        if name not in names:
            raise ValueError(f"task.reward_weights names {name!r}; {task.name} has {names}")
    weights = config.reward_weights
    rewards = [replace(r, weight=weights.get(r.name, r.weight)) for r in task.rewards]
    return replace(task, rewards=rewards)


def fresh_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int, device: torch.device
) -> PreTrainedModel:
    """A new model on ``device`` with the tokenizer's vocabulary and special tokens."""
    assert config.config is not None
    fields = {
        "vocab_size": len(tokenizer),
        "embedding_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config.config,
    }
    return on_device(new_model(fields, seed=seed), device)


def base_model(config: ModelConfig, source: str, device: torch.device) -> PreTrainedModel:
    """The checkpoint at ``source`` in the precision of the recipe, on ``device``."""
    frozen = config.lora is not None or config.adapter is not None
    half = config.dtype == "bfloat16" or (
        config.dtype == "auto" and frozen and device.type == "cuda"
    )
    model = load_model(
        source,
        dtype=torch.bfloat16 if half else torch.float32,
        attn_implementation=config.attn_implementation,
    )
    return on_device(model, device)


def on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    nn.Module.to(model, device)
    return model


def trainable_model(config: ModelConfig, base: PreTrainedModel, seed: int) -> nn.Module:
    """``base`` with the adapter that the recipe asks for, or itself."""
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    if config.lora is not None:
        lora = config.lora
        return add_lora(
            base,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            seed=seed,
        )
    if config.adapter is not None:
        return load_adapter(base, config.adapter, trainable=True)
    return base


def build_denoiser(
    config: TrainConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Denoiser:
    """The policy to train, with its reference where ``algorithm.beta`` asks for one."""
    adapters = config.model.lora is not None or config.model.adapter is not None
    reference = copy.deepcopy(base) if config.algorithm.beta > 0 and not adapters else None
    model = trainable_model(config.model, base, config.seed)
    return plain_denoiser(config, model, tokenizer, reference=reference)


def plain_denoiser(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reference: nn.Module | None = None,
) -> Denoiser:
    """``model`` with the special tokens of the tokenizer, in the precision of the recipe."""
    tokens = special_token_ids(tokenizer, model.config)
    return Denoiser(
        model,
        mask_id=tokens.mask,
        eos_id=tokens.eos,
        pad_id=tokens.pad,
        reference=reference,
        autocast=autocast_dtype(config, next(model.parameters()).device),
    )


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """bfloat16 where the recipe, or a GPU that has it, says so."""
    if config.mixed_precision == "bf16":
        return torch.bfloat16
    on_gpu = config.mixed_precision == "auto" and device.type == "cuda"
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else None


def check_data(config: TrainConfig, data: Data, context: int | None) -> None:
    """Prompts must fit the model's context, and rewards must exist."""
    if not data.task.rewards:
        raise ValueError(f"task {data.task.name} has no reward function")
    for prompts in (data.train, data.test):
        check_context(prompts.token_ids, config.generation, context)
