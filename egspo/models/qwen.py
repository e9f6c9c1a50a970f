"""Qwen's transformer, which several models keep by its tensor names.

Grouped-query attention, gated MLPs, and the names ``model.layers.N.self_attn`` and ``mlp``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PretrainedConfig

from egspo.models.attention import Attended, Pass, attend
from egspo.models.experts import fed
from egspo.models.transformer import (
    RMSNorm,
    Transformer,
    TransformerForMaskedLM,
    TransformerLayer,
)


class QwenAttention(nn.Module):
    """Grouped-query attention.

    Args:
        config: sizes.
        layer: number of the layer.
        bias: on queries, keys and values.
        normed: a norm over the head dimension of queries and keys.
    """

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: PretrainedConfig, layer: int, *, bias: bool, normed: bool) -> None:
        super().__init__()
        self.layer = layer
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, dim = config.hidden_size, config.head_dim
        inner, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(width, kv, bias=bias)
        self.v_proj = nn.Linear(width, kv, bias=bias)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.normed = normed
        if normed:
            self.q_norm = RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, pass_: Pass) -> Attended:
        """``x`` [B, N, D] to the output [B, N, D], weights, keys and values."""
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        norms = (self.q_norm, self.k_norm) if self.normed else None
        attended, weights, key, value = attend(self, self.layer, pass_, projected, norms)
        return self.o_proj(attended), weights, key, value


class QwenLayer(TransformerLayer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: PretrainedConfig, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def _compute(self, x: Tensor, pass_: Pass) -> Attended:
        attended, weights, key, value = self.self_attn(self.input_layernorm(x), pass_)
        x = x + attended
        x = x + fed(self.mlp, self.post_attention_layernorm(x), pass_.routes)
        return x, weights, key, value


class LayeredTransformer(Transformer):  # type: ignore[no-untyped-call, unused-ignore]
    """An embedding under ``_embedding``, ``layers`` and ``norm``, without a head."""

    _embedding = "embed_tokens"
    # A full checkpoint has the head beside the transformer.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: PretrainedConfig, layers: Iterable[TransformerLayer]) -> None:
        super().__init__(config)
        setattr(self, self._embedding, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]

    def get_input_embeddings(self) -> nn.Embedding:
        embedding: nn.Embedding = getattr(self, self._embedding)
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        setattr(self, self._embedding, value)

    def _layers(self) -> Iterable[TransformerLayer]:
        return self.layers  # type: ignore[return-value]

    def _final_norm(self) -> nn.Module:
        return self.norm


class HeadedForMaskedLM(TransformerForMaskedLM):  # type: ignore[no-untyped-call, unused-ignore]
    """A :class:`LayeredTransformer` and ``lm_head``, unless the embedding is the head."""

    model: LayeredTransformer

    def __init__(self, config: PretrainedConfig, model: type[LayeredTransformer]) -> None:
        super().__init__(config)
        self.model = model(config)  # type: ignore[call-arg]
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]
        # Collected from the transformer by post_init; with a head here, or tied, it is an error.
        self._keys_to_ignore_on_load_unexpected = set()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear | nn.Embedding:
        """The head, or the embedding where tied; ``weight`` is [vocab_size, hidden_size]."""
        tied = self.config.tie_word_embeddings
        return self.model.get_input_embeddings() if tied else self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear | nn.Embedding) -> None:
        if self.config.tie_word_embeddings:
            self.model.set_input_embeddings(new_embeddings)
        else:
            assert isinstance(new_embeddings, nn.Linear)
            self.lm_head = new_embeddings
