"""What the transformers share: the pass over their layers, the head and loading.

A model of its own is a configuration, the modules under their official names, and the few methods
that say where the shared code finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from egspo.models.attention import (
    Attended,
    Pass,
    bidirectional_mask,
    block_causal_mask,
    rope_tables,
)
from egspo.models.blocks import Columns, positions_of
from egspo.models.cache import KeyValueCache
from egspo.models.outputs import MaskedLMOutput, TransformerOutput
from egspo.models.routes import Routes


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, rounded to the input's dtype before the scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Half-precision input is reduced and scaled in float32 inside the operator.
        normed = F.rms_norm(x, (x.shape[-1],), eps=self.eps)
        return self.weight * normed.to(x.dtype)


class GatedMLP(nn.Module):
    """SiLU-gated MLP, without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class TransformerLayer(GradientCheckpointingLayer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """A layer that is recomputed in the backward pass where gradient checkpointing is enabled."""

    _gradient_checkpointing_func: Callable[..., Any]  # set by transformers when it is enabled

    def forward(self, x: Tensor, pass_: Pass) -> Attended:
        """``x`` [B, N, D] one layer further."""
        # The base class checkpoints in training mode only; policies are scored in evaluation mode.
        if self.gradient_checkpointing and not self.training and torch.is_grad_enabled():
            result: Attended = self._gradient_checkpointing_func(self._compute, x, pass_)
            return result
        return self._compute(x, pass_)

    def _compute(self, x: Tensor, pass_: Pass) -> Attended:
        raise NotImplementedError


class StrictPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """Loading that refuses what does not fit, and what else both classes of a model need."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def checkpoint_activations(self) -> None:
        """The backward pass computes each layer again, by whichever name transformers has it."""
        new = getattr(self, "activation_checkpointing_enable", None)
        (new or self.gradient_checkpointing_enable)()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers guesses by the text of the class's file, and warns where it guesses no.
        return True

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As peft asks, without the warning of transformers that the name is old."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

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
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **kwargs,
            )
        except RuntimeError as error:
            if "conversion of the weights" not in str(error):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} does not fit {cls.__name__}; experts lack some "
                "of their tensors, and cannot be stacked: the report above names their layers"
            ) from error
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


def _shorten(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


class Transformer(StrictPreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """Embedding, layers and final norm: what a model of its own says where to find."""

    def _layers(self) -> Iterable[TransformerLayer]:
        raise NotImplementedError

    def _final_norm(self) -> nn.Module:
        raise NotImplementedError

    def _embedding_dropout(self, x: Tensor) -> Tensor:
        return x

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
        streams: Tensor | None = None,
        routes: Routes | None = None,
        return_cache: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TransformerOutput:
        """Hidden states of every position.

        Each attends to all that are not padding; with a ``block_size`` in the configuration, to
        those of its own block and of earlier ones (:mod:`egspo.models.blocks`).

        With ``cache`` the input is only some columns of a sequence whose keys and values at the
        others are in the cache; without gradients the cache is overwritten at those columns.

        Args:
            input_ids: int [B, N]; or ``inputs_embeds``, [B, N, D].
            attention_mask: [B, S], zero or False at padding, on any side; or 4-D
                [B or 1, H or 1, N, S], bool with False where not to attend, or floating point,
                added to the scores. None for no padding. The hidden states at padding are finite
                and mean nothing. S is N, or the length of the cached sequences.
            position_ids: int [B or 1, N]; None for 0 .. N-1, or ``columns``. Only differences
                matter. With blocks, None counts from the first token that is not padding, and
                what is given must too; with ``streams``, of all S columns.
            cache: keys and values [B, kv_heads, S, head_dim] by layer.
            columns: int64 [B, N], which columns the input is; with ``cache`` only.
            live: bool [B, N], False at columns where the cached keys and values are to be kept.
            streams: int64 [B, S], 0 at the clean columns and a number of its own at each copy of a
                block; with ``position_ids`` only. None where all are clean.
            routes: takes down, or gives, the experts of every token.
            return_cache: also return the keys and values attended to.
            output_hidden_states, output_attentions: None for the configuration's.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``, a sequence longer
                than the context, a mask of another shape or dtype, ``cache`` without ``columns``
                or the reverse, ``streams`` without ``position_ids`` or of a model without blocks,
                or attention weights asked of another implementation than ``eager``.
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
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        pass_ = self._pass(x, attention_mask, position_ids, cache, columns, live, streams, routes)
        x = self._embedding_dropout(x)
        states: list[Tensor] = []
        attentions: list[Tensor] = []
        built = KeyValueCache()
        for layer in self._layers():
            if keep_states:
                states.append(x)
            x, weights, key, value = layer(x, pass_)
            if keep_attentions:
                assert weights is not None
                attentions.append(weights)
            if return_cache:
                built.append(key, value)
        x = self._final_norm()(x)
        return TransformerOutput(
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
        streams: Tensor | None,
        routes: Routes | None,
    ) -> Pass:
        if (cache is None) != (columns is None):
            raise ValueError("cache and columns belong together: give both or neither")
        if columns is not None and columns.shape != x.shape[:2]:
            raise ValueError(
                f"columns must be {tuple(x.shape[:2])}, one for each input token, "
                f"got {tuple(columns.shape)}"
            )
        keys = x.shape[1] if cache is None else cache.length
        # Copies behind a clean sequence, and room around a cached one, have no positions of theirs.
        blocks = getattr(self.config, "block_size", None)
        whole = blocks is None or (streams is None and cache is None)
        if whole and keys > self.config.max_sequence_length:
            raise ValueError(
                f"sequences of {keys} tokens exceed max_sequence_length "
                f"{self.config.max_sequence_length}"
            )
        if streams is not None and (blocks is None or position_ids is None):
            raise ValueError("streams need a model with blocks, and position_ids")
        if blocks is not None and (attention_mask is None or attention_mask.ndim == 2):
            if attention_mask is not None and attention_mask.shape != (x.shape[0], keys):
                raise ValueError(
                    f"attention_mask must be [{x.shape[0]}, {keys}] or [B, H, {x.shape[1]}, "
                    f"{keys}], got shape {tuple(attention_mask.shape)}"
                )
            every = position_ids
            if every is None or (cache is not None and streams is None):
                every = positions_of(attention_mask, x, keys)
            real = None if attention_mask is None else attention_mask != 0
            attended = Columns(every.expand(x.shape[0], -1) // blocks, streams, real)
            own = attended if columns is None else attended.take(columns)
            mask = block_causal_mask(self.config, own, attended, x)
            if position_ids is None or streams is not None:
                position_ids = every if columns is None else every.gather(1, columns)
        else:
            mask = bidirectional_mask(self.config, attention_mask, x, keys)
            if position_ids is None:
                position_ids = columns
            if position_ids is None:
                position_ids = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = rope_tables(self.config, position_ids)
        return Pass(self.config, cos, sin, mask, cache, columns, live, routes)


def _default(value: bool | None, default: bool | None) -> bool:
    return bool(default if value is None else value)


class TransformerForMaskedLM(StrictPreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """A transformer, ``model``, and a language-model head.

    The configuration's ``prediction_shift`` says how many columns to the left of a position the
    transformer's row is that predicts it: the rows are moved by that before the head. A cached
    pass that is to predict the columns [start, end) is given [start - prediction_shift, end), and
    its first ``prediction_shift`` rows are for nobody.
    """

    model: Transformer

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
        streams: Tensor | None = None,
        routes: Routes | None = None,
        return_cache: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MaskedLMOutput:
        """Hidden states and, if asked, the logits of all positions and the loss.

        Args:
            labels: int64 [B, N], the tokens at the positions, -100 where no loss is taken.
            compute_logits: False leaves the head to the caller, who may need it at few positions.

        Other arguments and errors are those of :meth:`Transformer.forward`.

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
            streams=streams,
            routes=routes,
            return_cache=return_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden = _shifted(output.last_hidden_state, self.config.prediction_shift)
        logits, loss = None, None
        if compute_logits:
            logits = self._head(hidden)
        if labels is not None and logits is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            cache=output.cache,
            last_hidden_state=hidden,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _head(self, hidden: Tensor) -> Tensor:
        head: Any = self.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
        if isinstance(head, nn.Embedding):
            return F.linear(hidden, head.weight)
        logits: Tensor = head(hidden)
        return logits


def _shifted(hidden: Tensor, shift: int) -> Tensor:
    """Rows [B, N, D] moved ``shift`` places to the right; the first ones stay."""
    return hidden if shift == 0 else torch.cat((hidden[:, :shift], hidden[:, :-shift]), dim=1)
