"""One tiny model of every family: tests that run over all of them take them from here."""

from __future__ import annotations

from typing import Any

import torch

from egspo.models import new_model
from egspo.models.experts import GroupedRouter
from egspo.models.transformer import RMSNorm, TransformerForMaskedLM

_QWEN: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough for attention to be far from uniform
    "mask_token_id": 5,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llada": {
        "model_type": "llada",
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "mlp_hidden_size": 48,
        "vocab_size": 60,
        "max_sequence_length": 64,
        "init_std": 0.2,
        "mask_token_id": 5,
        "eos_token_id": 1,
        "pad_token_id": 1,
    },
    "dream": {**_QWEN, "model_type": "Dream"},
    "sdar": {**_QWEN, "model_type": "sdar", "head_dim": 12, "block_size": 4},
    "sdar_moe": {**_QWEN, **_EXPERTS, "model_type": "sdar_moe", "head_dim": 12, "block_size": 4},
    "llada2": {
        **_QWEN,
        **_EXPERTS,
        "model_type": "llada2_moe",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "n_group": 4,
        "topk_group": 2,
        "block_size": 4,
    },
}
BLOCK_CAUSAL = ("sdar", "sdar_moe", "llada2")


def make(
    family: str, seed: int = 0, attn_implementation: str = "sdpa", **fields: Any
) -> TransformerForMaskedLM:
    """A tiny model in evaluation mode, with norms, biases and router biases that count."""
    model = new_model({**FAMILIES[family], **fields}, seed=seed).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(std=0.2, generator=generator)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, GroupedRouter):
            module.expert_bias.uniform_(-0.3, 0.3, generator=generator)
    model.set_attn_implementation(attn_implementation)
    return model


def disturb(model: Any, std: float = 0.2) -> Any:
    """Make adapters count: their second factors start at zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std, generator=generator)
    return model


def new_fields(family: str) -> dict[str, Any]:
    """Of a new model in a recipe: the tokenizer decides the rest."""
    left_out = ("vocab_size", "mask_token_id", "eos_token_id", "pad_token_id")
    return {k: v for k, v in FAMILIES[family].items() if k not in left_out}
