"""LLaDA2: a mixture of experts, denoised block by block.

Queries, keys and values are one projection, normed over the head dimension and rotated in part of
it. The first layers are dense; in the others every token goes through a shared expert and the
experts that :class:`egspo.models.experts.GroupedRouter` chooses.
"""

from __future__ import annotations

from torch import Tensor, nn

from egspo.models.attention import Attended, Pass, attend
from egspo.models.experts import (
    GroupedRouter,
    MixtureOfExperts,
    MixturePreTrainedModel,
    fed,
    register_experts,
)
from egspo.models.llada2.configuration import LLaDA2Config
from egspo.models.qwen import HeadedForMaskedLM, LayeredTransformer
from egspo.models.transformer import GatedMLP, RMSNorm, TransformerLayer


class LLaDA2Attention(nn.Module):
    """Grouped-query attention by one projection."""

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: LLaDA2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_groups = heads // kv
        self.widths = [heads * dim, kv * dim, kv * dim]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.query_layernorm = RMSNorm(dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(dim, config.rms_norm_eps)
        self.dense = nn.Linear(heads * dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, pass_: Pass) -> Attended:
        """``x`` [B, N, D] to the output [B, N, D], weights, keys and values."""
        projected = list(self.query_key_value(x).split(self.widths, dim=-1))
        norms = self.query_layernorm, self.key_layernorm
        attended, weights, key, value = attend(self, self.layer, pass_, projected, norms)
        return self.dense(attended), weights, key, value


class LLaDA2DecoderLayer(TransformerLayer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Attention and MLP or experts, each behind a norm and added to the residual stream."""

    def __init__(self, config: LLaDA2Config, layer: int) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.moe_intermediate_size
        self.attention = LLaDA2Attention(config, layer)
        self.mlp: nn.Module
        if layer < config.first_k_dense_replace:
            self.mlp = GatedMLP(width, config.intermediate_size)
        else:
            shared = GatedMLP(width, hidden * config.num_shared_experts)
            self.mlp = MixtureOfExperts(
                config, GroupedRouter(config), shared, layer - config.first_k_dense_replace
            )
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)

    def _compute(self, x: Tensor, pass_: Pass) -> Attended:
        attended, weights, key, value = self.attention(self.input_layernorm(x), pass_)
        x = x + attended
        x = x + fed(self.mlp, self.post_attention_layernorm(x), pass_.routes)
        return x, weights, key, value


class LLaDA2PreTrainedModel(MixturePreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """What both LLaDA2 classes tell transformers."""

    config: LLaDA2Config
    config_class = LLaDA2Config
    _supports_flash_attn = False
    _no_split_modules = ["LLaDA2DecoderLayer"]  # noqa: RUF012 - the type that transformers declares


class LLaDA2Model(LLaDA2PreTrainedModel, LayeredTransformer):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer without a head."""

    _embedding = "word_embeddings"

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(
            config, [LLaDA2DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )


class LLaDA2ForMaskedLM(LLaDA2PreTrainedModel, HeadedForMaskedLM):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer and its head: logits at position ``i`` predict the token at ``i``."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(config, LLaDA2Model)


register_experts(LLaDA2Config.model_type)
