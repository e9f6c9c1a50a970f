"""LLaDA: a bidirectional transformer that predicts the tokens under ``[MASK]``.

Module names are those of the official checkpoints, so that their tensors, and adapters published
for them, load by their own keys. Two names are easily confused: ``model.transformer.ff_out`` is the
language-model head, ``model.transformer.blocks.N.ff_out`` the down-projection of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput, can_return_tuple

from egspo.models.cache import KeyValueCache
from egspo.models.llada.attention import (
    apply_rope,
    bidirectional_mask,
    eager_attention,
    rope_tables,
)
from egspo.models.llada.configuration import LLaDAConfig


@dataclass
class LLaDAModelOutput(ModelOutput):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """What :class:`LLaDAModel` returns; attributes as in :class:`LLaDAOutput`."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cache: KeyValueCache | None = None


@dataclass
class LLaDAOutput(ModelOutput):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """What :class:`LLaDAForMaskedLM` returns.

    Attributes:
        loss: float32 scalar, where labels were given.
        logits: [B, S, embedding_size], None with ``compute_logits=False``.
        last_hidden_state: [B, S, d_model], after the final norm.
        hidden_states: ``n_layers + 1`` tensors [B, S, d_model], the last one after the final norm.
        attentions: ``n_layers`` tensors [B, n_heads, S, S].
        cache: keys and values, with ``return_cache=True``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: KeyValueCache | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class LLaDARMSNorm(nn.Module):
    """Root-mean-square norm in float32, rounded to the input's dtype before the scale."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        # Half-precision input is reduced and scaled in float32 inside the operator.
        normed = F.rms_norm(x, (x.shape[-1],), eps=self.eps)
        return self.weight * normed.to(x.dtype)


@dataclass(frozen=True)
class _Pass:
    """What every block of a forward pass needs beside its input."""

    cos: Tensor
    sin: Tensor
    attention_mask: Tensor | None
    cache: KeyValueCache | None
    columns: Tensor | None
    live: Tensor | None


_BlockOutput = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""Hidden states, attention weights where they are computed, keys and values attended to."""


class LLaDABlock(GradientCheckpointingLayer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Attention and gated MLP, each behind a norm and added to the residual stream."""

    is_causal = False  # read by transformers' attention functions
    _gradient_checkpointing_func: Callable[..., Any]  # set by transformers when it is enabled

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__()
        assert config.n_kv_heads is not None and config.mlp_hidden_size is not None
        self.config, self.layer = config, layer
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        width, hidden, kv = config.d_model, config.mlp_hidden_size, config.n_kv_heads
        bias = config.include_bias
        qkv_bias = bias or config.include_qkv_bias
        self.attn_norm = LLaDARMSNorm(config)
        self.q_proj = nn.Linear(width, width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv * config.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv * config.head_dim, bias=qkv_bias)
        self.attn_out = nn.Linear(width, width, bias=bias)
        self.ff_norm = LLaDARMSNorm(config)
        self.ff_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.ff_out = nn.Linear(hidden, width, bias=bias)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, pass_: _Pass) -> _BlockOutput:
        """``x`` [B, N, D] one block further."""
        # The base class checkpoints in training mode only; policies are scored in evaluation mode.
        if self.gradient_checkpointing and not self.training and torch.is_grad_enabled():
            result: _BlockOutput = self._gradient_checkpointing_func(self._compute, x, pass_)
            return result
        return self._compute(x, pass_)

    def _compute(self, x: Tensor, pass_: _Pass) -> _BlockOutput:
        attended, weights, key, value = self._attention(self.attn_norm(x), pass_)
        x = x + self.dropout(attended)
        normed = self.ff_norm(x)
        gated = F.silu(self.ff_proj(normed)) * self.up_proj(normed)
        return x + self.dropout(self.ff_out(gated)), weights, key, value

    def _attention(self, x: Tensor, pass_: _Pass) -> _BlockOutput:
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).view(batch, length, -1, self.config.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (apply_rope(t, pass_.cos, pass_.sin) for t in (query, key))
        if pass_.cache is not None:
            assert pass_.columns is not None
            key, value = pass_.cache.merged(self.layer, pass_.columns, pass_.live, key, value)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            pass_.attention_mask,
            scaling=self.config.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
        return self.attn_out(output.reshape(batch, length, -1)), weights, key, value


class LLaDATransformer(nn.Module):
    """Holder of the official names: embedding, blocks, final norm, and the head if there is one."""

    ff_out: nn.Linear  # the head: put here by LLaDAForMaskedLM where it is not the embedding

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        assert config.embedding_size is not None
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.emb_drop = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(LLaDABlock(config, i) for i in range(config.n_layers))
        self.ln_f = LLaDARMSNorm(config)


class LLaDAPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """Loading, saving and initialisation common to the LLaDA classes."""

    config: LLaDAConfig
    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 - the type that transformers declares
    _supports_sdpa = True
    _supports_flash_attn = True

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | None,
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """As in transformers, but a checkpoint that does not fit raises instead of warning.

        Raises:
            ValueError: tensors are missing, unknown or (without ``ignore_mismatched_sizes``) of
                another shape; the message names them.
        """
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **kwargs,
        )
        model, info = loaded
        shapes = [] if ignore_mismatched_sizes else sorted(info["mismatched_keys"])
        problems = {
            "missing": sorted(info["missing_keys"]),
            "unknown": sorted(info["unexpected_keys"]),
            "mis-shaped": [f"{k} (file {tuple(a)}, model {tuple(b)})" for k, a, b in shapes],
            "failed": list(info["error_msgs"]),
        }
        found = [f"{len(v)} {kind}: {_shorten(v)}" for kind, v in problems.items() if v]
        if found:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not fit {cls.__name__}; " + "; ".join(found)
            )
        result: Self | tuple[Self, dict[str, Any]] = loaded if output_loading_info else model
        return result

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; afterwards ``vocab_size`` and ``embedding_size`` are equal."""
        embedding: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = embedding.weight.shape[0]
        return embedding


def _shorten(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


class LLaDAModel(LLaDAPreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
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

    @can_return_tuple  # type: ignore[untyped-decorator, unused-ignore]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: KeyValueCache | None = None,
        columns: Tensor | None = None,
        live: Tensor | None = None,
        return_cache: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> LLaDAModelOutput:
        """Hidden states of every position, each attending to all that are not padding.

        With ``cache`` the input is only some columns of a sequence whose keys and values at the
        others are in the cache; without gradients the cache is overwritten at those columns.

        Args:
            input_ids: int [B, N]; or ``inputs_embeds``, [B, N, d_model].
            attention_mask: [B, S], zero or False at padding, on any side; or 4-D
                [B or 1, H or 1, N, S], bool with False where not to attend, or floating point,
                added to the scores. None for no padding. The hidden states at padding are finite
                and mean nothing. S is N, or the length of the cached sequences.
            position_ids: int [B or 1, N]; None for 0 .. N-1, or ``columns``. Only differences
                matter.
            cache: keys and values [B, n_kv_heads, S, head_dim] by layer.
            columns: int64 [B, N], which columns the input is; with ``cache`` only.
            live: bool [B, N], False at columns where the cached keys and values are to be kept.
            return_cache: also return the keys and values attended to.
            output_hidden_states, output_attentions: None for the configuration's.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``, a sequence longer
                than ``max_sequence_length``, a mask of another shape or dtype, ``cache`` without
                ``columns`` or the reverse, or attention weights asked of another implementation
                than ``eager``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        keep_states = _default(output_hidden_states, self.config.output_hidden_states)
        keep_attentions = _default(output_attentions, self.config.output_attentions)
        if keep_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                "output_attentions needs attn_implementation='eager', got "
                f"{self.config._attn_implementation!r}"
            )
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        pass_ = self._pass(x, attention_mask, position_ids, cache, columns, live)
        x = self.transformer.emb_drop(x)
        states: list[Tensor] = []
        attentions: list[Tensor] = []
        built = KeyValueCache()
        for block in self.transformer.blocks:
            if keep_states:
                states.append(x)
            x, weights, key, value = block(x, pass_)
            if keep_attentions:
                attentions.append(weights)
            if return_cache:
                built.append(key, value)
        x = self.transformer.ln_f(x)
        return LLaDAModelOutput(
            last_hidden_state=x,
            hidden_states=(*states, x) if keep_states else None,
            attentions=tuple(attentions) if keep_attentions else None,
            cache=built if return_cache else None,
        )

    def _pass(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KeyValueCache | None,
        columns: Tensor | None,
        live: Tensor | None,
    ) -> _Pass:
        if (cache is None) != (columns is None):
            raise ValueError("cache and columns belong together: give both or neither")
        if columns is not None and columns.shape != x.shape[:2]:
            raise ValueError(
                f"columns must be {tuple(x.shape[:2])}, one for each input token, "
                f"got {tuple(columns.shape)}"
            )
        keys = x.shape[1] if cache is None else cache.keys[0].shape[2]
        if keys > self.config.max_sequence_length:
            raise ValueError(
                f"sequences of {keys} tokens exceed max_sequence_length "
                f"{self.config.max_sequence_length}"
            )
        if position_ids is None:
            position_ids = columns
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = rope_tables(self.config, position_ids)
        mask = bidirectional_mask(self.config, attention_mask, x, keys)
        return _Pass(cos, sin, mask, cache, columns, live)


def _default(value: bool | None, default: bool | None) -> bool:
    return bool(default if value is None else value)


class LLaDAForMaskedLM(LLaDAPreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer and its head: logits at position ``i`` predict the token at ``i``."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model: LLaDAModel = LLaDAModel(config)
        if not config.weight_tying:
            assert config.embedding_size is not None
            self.model.transformer.ff_out = nn.Linear(
                config.d_model, config.embedding_size, bias=config.include_bias
            )
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]
        # Collected from the transformer by post_init; with a head here, or tied, it is an error.
        self._keys_to_ignore_on_load_unexpected = set()

    def get_input_embeddings(self) -> nn.Embedding:
        embedding: nn.Embedding = self.model.transformer.wte
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear | nn.Embedding:
        """The head, or the embedding where tied; ``weight`` is [embedding_size, d_model]."""
        transformer: LLaDATransformer = self.model.transformer
        return transformer.wte if self.config.weight_tying else transformer.ff_out

    def set_output_embeddings(self, new_embeddings: nn.Linear | nn.Embedding) -> None:
        name = "wte" if self.config.weight_tying else "ff_out"
        setattr(self.model.transformer, name, new_embeddings)

    @can_return_tuple  # type: ignore[untyped-decorator, unused-ignore]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        compute_logits: bool = True,
        cache: KeyValueCache | None = None,
        columns: Tensor | None = None,
        live: Tensor | None = None,
        return_cache: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> LLaDAOutput:
        """Hidden states and, if asked, the logits of all positions and the loss.

        Args:
            labels: int64 [B, S], -100 where no loss is taken; not shifted.
            compute_logits: False leaves the head to the caller, who may need it at few positions.

        Other arguments and errors are those of :meth:`LLaDAModel.forward`.

        Raises:
            ValueError: labels with ``compute_logits=False``.
        """
        if labels is not None and not compute_logits:
            raise ValueError("labels need compute_logits=True")
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            columns=columns,
            live=live,
            return_cache=return_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits, loss = None, None
        if compute_logits:
            logits = self._head(output.last_hidden_state)
        if labels is not None and logits is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return LLaDAOutput(
            loss=loss,
            logits=logits,
            cache=output.cache,
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _head(self, hidden: Tensor) -> Tensor:
        head = self.get_output_embeddings()
        if isinstance(head, nn.Embedding):
            return F.linear(hidden, head.weight)
        logits: Tensor = head(hidden)
        return logits
