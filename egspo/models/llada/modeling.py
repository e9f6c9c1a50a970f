"""LLaDA: a bidirectional transformer that predicts the tokens under ``[MASK]``.

Module names are those of the official checkpoints, so that their tensors, and adapters published
for them, load by their own keys. Two names are easily confused: ``model.transformer.ff_out`` is the
language-model head, ``model.transformer.blocks.N.ff_out`` the down-projection of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from egspo.models.attention import Attended, Pass, attend
from egspo.models.llada.configuration import LLaDAConfig
from egspo.models.transformer import (
    RMSNorm,
    StrictPreTrainedModel,
    Transformer,
    TransformerForMaskedLM,
    TransformerLayer,
)


class LLaDABlock(TransformerLayer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Attention and gated MLP, each behind a norm and added to the residual stream."""

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__()
        assert config.n_kv_heads is not None and config.mlp_hidden_size is not None
        self.layer = layer
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        width, hidden, kv = config.d_model, config.mlp_hidden_size, config.n_kv_heads
        bias = config.include_bias
        qkv_bias = bias or config.include_qkv_bias
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv * config.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv * config.head_dim, bias=qkv_bias)
        self.attn_out = nn.Linear(width, width, bias=bias)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.ff_out = nn.Linear(hidden, width, bias=bias)
        self.dropout = nn.Dropout(config.residual_dropout)

    def _compute(self, x: Tensor, pass_: Pass) -> Attended:
        normed = self.attn_norm(x)
        projected = [self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)]
        attended, weights, key, value = attend(self, self.layer, pass_, projected)
        x = x + self.dropout(self.attn_out(attended))
        normed = self.ff_norm(x)
        gated = F.silu(self.ff_proj(normed)) * self.up_proj(normed)
        return x + self.dropout(self.ff_out(gated)), weights, key, value


class LLaDATransformer(nn.Module):
    """Holder of the official names: embedding, blocks, final norm, and the head if there is one."""

    ff_out: nn.Linear  # the head: put here by LLaDAForMaskedLM where it is not the embedding

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        assert config.embedding_size is not None
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.emb_drop = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(LLaDABlock(config, i) for i in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)


class LLaDAPreTrainedModel(StrictPreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """What both LLaDA classes tell transformers."""

    config: LLaDAConfig
    config_class = LLaDAConfig
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 - the type that transformers declares

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; afterwards ``vocab_size`` and ``embedding_size`` are equal."""
        embedding: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = embedding.weight.shape[0]
        return embedding


class LLaDAModel(LLaDAPreTrainedModel, Transformer):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer without a head."""

    # A full checkpoint has the head inside the transformer.
    _keys_to_ignore_on_load_unexpected = [r"transformer\.ff_out\."]  # noqa: RUF012

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.transformer = LLaDATransformer(config)
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.transformer.wte = value

    def _layers(self) -> Iterable[TransformerLayer]:
        return self.transformer.blocks  # type: ignore[return-value]

    def _final_norm(self) -> nn.Module:
        return self.transformer.ln_f

    def _embedding_dropout(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.transformer.emb_drop(x)
        return dropped


class LLaDAForMaskedLM(LLaDAPreTrainedModel, TransformerForMaskedLM):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer and its head: logits at position ``i`` predict the token at ``i``."""

    model: LLaDAModel

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        if not config.weight_tying:
            assert config.embedding_size is not None
            self.model.transformer.ff_out = nn.Linear(
                config.d_model, config.embedding_size, bias=config.include_bias
            )
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]
        # Collected from the transformer by post_init; with a head here, or tied, it is an error.
        self._keys_to_ignore_on_load_unexpected = set()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear | nn.Embedding:
        """The head, or the embedding where tied; ``weight`` is [embedding_size, d_model]."""
        transformer = self.model.transformer
        return transformer.wte if self.config.weight_tying else transformer.ff_out

    def set_output_embeddings(self, new_embeddings: nn.Linear | nn.Embedding) -> None:
        name = "wte" if self.config.weight_tying else "ff_out"
        setattr(self.model.transformer, name, new_embeddings)
