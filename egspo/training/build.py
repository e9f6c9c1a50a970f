"""From a configuration to the parts of a run: tokenizer, task, model, prompts."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from egspo.algorithm.objectives.registry import check_objective
from egspo.config import ModelConfig, TrainConfig
from egspo.models import add_lora, load_adapter, load_model, new_model
from egspo.models.attention import check_attention
from egspo.models.experts import freeze_routers
from egspo.models.loading import set_block_size
from egspo.models.lora import REFERENCE_ADAPTER, add_reference_adapter, check_targets
from egspo.models.quantization import keep_differentiable, nf4_config
from egspo.rollouts.decoding import check_decoding
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import check_context
from egspo.tasks.prompts import Data, check_task

logger = logging.getLogger("egspo")


def fresh_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: torch.device,
    placed: torch.device | None = None,
) -> PreTrainedModel:
    """A new model for ``device`` with the tokenizer's vocabulary and special tokens.

    ``placed`` is where its weights are put, if not there.

    Raises:
        ValueError: the tokenizer has no mask or end-of-text token, or ``model.config`` is wrong.
    """
    model = new_model(fresh_fields(config, tokenizer), seed=seed)
    set_block_size(model.config, config.block_size)
    model.set_attn_implementation(config.attn_implementation)
    return on_device(model, placed or device, weights_dtype(config, device))


def fresh_fields(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """``model.config`` with what the tokenizer decides; raises as :func:`fresh_model`."""
    assert config.config is not None
    for name in ("mask", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} (model.tokenizer) has no {name} token: "
                "a new model takes its special tokens from it"
            )
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config.config,
    }
    return fields


def base_model(
    config: ModelConfig, source: str, device: torch.device, placed: torch.device | None = None
) -> PreTrainedModel:
    """The checkpoint at ``source`` in the precision of the recipe on ``device``, put there or to
    ``placed``."""
    dtype = weights_dtype(config, device)
    attention = config.attn_implementation
    if config.quantization == "none":
        model = load_model(source, dtype=dtype, attn_implementation=attention)
        set_block_size(model.config, config.block_size)
        return on_device(model, placed or device)
    # Quantised as it is read, so that the whole model never lies in memory.
    model = load_model(
        source,
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=nf4_config(dtype),
        device_map={"": device},
    )
    keep_differentiable(model)
    set_block_size(model.config, config.block_size)
    return model


def weights_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """What ``model.dtype`` means on ``device``."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return torch.bfloat16 if config.has_adapter and device.type == "cuda" else torch.float32


def on_device(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    nn.Module.to(model, device, dtype)
    return model


def trainable_model(config: ModelConfig, base: PreTrainedModel, seed: int) -> nn.Module:
    """``base`` with the adapter that the recipe asks for, or itself."""
    if config.gradient_checkpointing:
        own: Any = base
        own.checkpoint_activations()
    if config.lora is not None:
        lora = config.lora
        return add_lora(
            base,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            experts=lora.experts,
            seed=seed,
        )
    if config.adapter is not None:
        return load_adapter(base, config.adapter, trainable=True)
    if not config.train_routers:
        freeze_routers(base)
    return base


def build_denoiser(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Denoiser:
    """The policy to train on ``device``, with its reference where ``algorithm.beta`` > 0."""
    copied = config.algorithm.beta > 0 and not config.model.has_adapter
    reference = copy.deepcopy(base) if copied else None
    model = trainable_model(config.model, base, config.seed)
    continued = config.continues_from_reference
    if isinstance(model, PeftModel) and (continued or config.algorithm.reference_every is not None):
        add_reference_adapter(model)
    denoiser = plain_denoiser(config, model, tokenizer, device, reference=reference)
    if continued:
        denoiser.reference_adapter = REFERENCE_ADAPTER
    return denoiser


def plain_denoiser(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    reference: nn.Module | None = None,
) -> Denoiser:
    """``model`` with the special tokens of the tokenizer, in the precision of the recipe on
    ``device``."""
    if config.model.activation_offload and device.type == "cpu":
        logger.warning(
            "model.activation_offload saves nothing on a CPU: activations are copied within its "
            "memory"
        )
    return Denoiser.of(
        model,
        tokenizer,
        reference=reference,
        autocast=autocast_dtype(config, device),
        activation_offload=config.model.activation_offload,
    )


def check_trackers(config: TrainConfig) -> None:
    """Refuse trackers that are not installed, which accelerate leaves out without a word."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for tracker in config.trackers:
        if tracker not in available:
            raise ValueError(
                f"trackers has {tracker!r}, which is not installed: pip install 'egspo[{tracker}]'"
            )


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """bfloat16 where the recipe, or a GPU that has it, says so."""
    if config.mixed_precision == "bf16":
        return torch.bfloat16
    on_gpu = config.mixed_precision == "auto" and device.type == "cuda"
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else None


def check_data(config: TrainConfig, data: Data, model_config: PretrainedConfig) -> None:
    """Prompts must fit the model's context, options its attention, and rewards the algorithm.

    Raises:
        ValueError: naming the prompt, the reward or the option that is in the way.
    """
    check_model(config, model_config)
    context = getattr(model_config, "max_sequence_length", None)
    check_task(config, data.task)
    for prompts in (data.train, data.held_out):
        check_context(prompts.token_ids, config.generation, context)


def check_lora(config: ModelConfig, model: PreTrainedModel) -> None:
    """The adapter of the recipe must find what it is on; raises ValueError where it does not."""
    if config.lora is not None:
        check_targets(model, config.lora.target_modules, experts=config.lora.experts)


def check_model(config: TrainConfig, model_config: PretrainedConfig) -> None:
    """Options must have a meaning for the model; raises ValueError naming the one that has none."""
    check_attention(config.model.attn_implementation)
    block_size = getattr(model_config, "block_size", None)
    check_decoding(config.generation, block_size)
    check_objective(config, block_size)
    if block_size is not None and config.algorithm.entropy_over == "masked":
        raise ValueError(
            "algorithm.entropy_over: masked needs every masked position in each step, and a "
            "block-causal model computes one block: choose revealed or block"
        )
    if block_size is None and config.algorithm.completion_blocks != "all":
        raise ValueError(
            f"algorithm.completion_blocks: {config.algorithm.completion_blocks} is of block-causal "
            "models; with full attention one pass fills every block"
        )
    if block_size is None and config.algorithm.share_prompts != "auto":
        raise ValueError(
            f"algorithm.share_prompts: {config.algorithm.share_prompts} is of block-causal models; "
            "with full attention a prompt is another one in every state"
        )
    if config.algorithm.replay_experts and not hasattr(model_config, "num_experts"):
        raise ValueError(
            f"algorithm.replay_experts is of models with experts, and {model_config.model_type} "
            "has none"
        )
