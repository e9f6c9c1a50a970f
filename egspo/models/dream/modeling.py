"""Dream: Qwen2.5's transformer, bidirectional, that predicts the tokens under ``[MASK]``.

Dream grew out of an autoregressive model and kept its head one place to the left: the row of
column ``i - 1`` predicts the token at ``i``. Here the rows are moved by one before the head, so
that callers find what predicts a position at that position, as with any other model. The first row
has nobody to its left and stays: neither the first column, of a sequence or of a cached pass, nor
the first token behind padding on the left is for callers to predict.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from egspo.models.attention import Attended, Pass, attend
from egspo.models.dream.configuration import DreamConfig
from egspo.models.transformer import (
    RMSNorm,
    StrictPreTrainedModel,
    Transformer,
    TransformerForMaskedLM,
    TransformerLayer,
)


class DreamAttention(nn.Module):
    """Grouped-query attention with biases on queries, keys and values."""

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: DreamConfig, layer: int) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None
        self.layer = layer
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, pass_: Pass) -> Attended:
        """``x`` [B, N, D] to the output [B, N, D], weights, keys and values."""
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        attended, weights, key, value = attend(self, self.layer, pass_, projected)
        return self.o_proj(attended), weights, key, value


class DreamMLP(nn.Module):
    """SiLU-gated MLP."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class DreamDecoderLayer(TransformerLayer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Attention and gated MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: DreamConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = DreamAttention(config, layer)
        self.mlp = DreamMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def _compute(self, x: Tensor, pass_: Pass) -> Attended:
        attended, weights, key, value = self.self_attn(self.input_layernorm(x), pass_)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), weights, key, value


class DreamPreTrainedModel(StrictPreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """What both Dream classes tell transformers."""

    config: DreamConfig
    config_class = DreamConfig
    _no_split_modules = ["DreamDecoderLayer"]  # noqa: RUF012 - the type that transformers declares


class DreamModel(DreamPreTrainedModel, Transformer):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer without a head; its rows are not moved."""

    # A full checkpoint has the head beside the transformer.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DreamDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.embed_tokens = value

    def _layers(self) -> Iterable[TransformerLayer]:
        return self.layers  # type: ignore[return-value]

    def _final_norm(self) -> nn.Module:
        return self.norm


class DreamForMaskedLM(DreamPreTrainedModel, TransformerForMaskedLM):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer and its head: logits at position ``i`` predict the token at ``i``."""

    model: DreamModel

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = DreamModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]
        # Collected from the transformer by post_init; with a head here, or tied, it is an error.
        self._keys_to_ignore_on_load_unexpected = set()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear | nn.Embedding:
        """The head, or the embedding where tied; ``weight`` is [vocab_size, hidden_size]."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear | nn.Embedding) -> None:
        if self.config.tie_word_embeddings:
            self.model.set_input_embeddings(new_embeddings)
        else:
            assert isinstance(new_embeddings, nn.Linear)
            self.lm_head = new_embeddings
