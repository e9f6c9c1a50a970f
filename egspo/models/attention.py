"""Attention: rotary embedding, masks, and the pass over all or some columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from egspo.models.blocks import Columns, dense_mask, flex_mask
from egspo.models.cache import KeyValueCache
from egspo.models.routes import Routes

# Added to a score, leaves it no weight; finite in any dtype that autocast may give the scores.
_CLOSED = -3.0e4

# Implementations that take any mask; flex_attention is sdpa where its block masks serve nothing.
_PLAIN = ("eager", "sdpa", "flex_attention")

Attended = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""A result [B, N, ...], the attention weights [B, H, N, S] where the implementation gives them, and
the keys and values attended to, [B, kv_heads, S, head_dim]."""


@dataclass(frozen=True)
class Pass:
    """What every layer of a forward pass needs beside its input."""

    config: PretrainedConfig
    cos: Tensor
    sin: Tensor
    attention_mask: Any
    """None, a tensor in the form that the attention implementation takes, or a ``BlockMask``."""
    cache: KeyValueCache | None
    columns: Tensor | None
    live: Tensor | None
    routes: Routes | None = None


def attend(
    module: nn.Module,
    layer: int,
    pass_: Pass,
    projected: list[Tensor],
    norms: tuple[nn.Module, nn.Module] | None = None,
) -> Attended:
    """Attention over the input's own columns and the cached ones.

    Args:
        module: with ``is_causal`` and ``num_key_value_groups``, which transformers' attention
            functions read.
        layer: number of the layer, for the cache.
        pass_: of this forward.
        projected: query, key and value [B, N, heads * head_dim], not rotated yet.
        norms: of queries and keys over head_dim, before the rotation.

    Returns:
        The output [B, N, H * head_dim], weights, keys and values.
    """
    config = pass_.config
    batch, length, _ = projected[0].shape
    query, key, value = (
        t.view(batch, length, -1, config.head_dim).transpose(1, 2) for t in projected
    )
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    query, key = (apply_rope(t, pass_.cos, pass_.sin) for t in (query, key))
    if pass_.cache is not None:
        assert pass_.columns is not None
        key, value = pass_.cache.merged(layer, pass_.columns, pass_.live, key, value)
    chosen = config._attn_implementation
    if chosen == "flex_attention" and not isinstance(pass_.attention_mask, BlockMask):
        chosen = "sdpa"  # as :func:`block_causal_mask` has it
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention)
    output, weights = attention(
        module,
        query,
        key,
        value,
        pass_.attention_mask,
        scaling=config.head_dim**-0.5,
        dropout=config.attention_dropout if module.training else 0.0,
    )
    return output.reshape(batch, length, -1), weights, key, value


def check_attention(name: str) -> None:
    """Raise ValueError unless transformers knows the attention implementation, or it is one of the
    hub (``owner/name``). Whether it can run here is another question."""
    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    if name not in known and "/" not in name:
        raise ValueError(
            f"model.attn_implementation must be one of {sorted(known)} or owner/name of a kernel "
            f"on the hub, got {name!r}"
        )


def rope_tables(config: PretrainedConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, float32 [B or 1, 1, S, rotary_dim].

    ``rotary_dim`` is the configuration's, ``head_dim`` where it has none. Computed at every call:
    a buffer would be rounded by ``.to(bfloat16)``, and be empty after construction on the meta
    device.
    """
    dim = getattr(config, "rotary_dim", None) or config.head_dim
    device = position_ids.device
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    angles = position_ids[:, None, :, None].float() * config.rope_theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [B, H, S, head_dim], its first dimensions rotated in float32, in its own dtype."""
    wide = x.float()
    turned, rest = wide[..., : cos.shape[-1]], wide[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return (torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operators, in the signature of transformers' attention interface.

    Returns:
        The output [B, S, H, head_dim] and the weights [B, H, S, S].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    output = F.dropout(weights, dropout, training=module.training) @ value
    return output.transpose(1, 2), weights


def bidirectional_mask(
    config: PretrainedConfig, mask: Tensor | None, x: Tensor, keys: int
) -> Tensor | None:
    """``mask`` in the form that the attention implementation takes.

    A row that may attend to nothing attends to everything instead: its softmax would be NaN.

    Args:
        config: with the attention implementation.
        mask: None, [B, S] (zero or False at padding) or [B or 1, H or 1, N, S] (bool, or added).
        x: input embeddings [B, N, D] of the N queries.
        keys: S.

    Raises:
        ValueError: another shape or dtype, a 4-D mask for flash attention, or fewer queries than
            keys with an implementation that does not take them.
    """
    if mask is None:
        return None
    batch, queries = x.shape[:2]
    implementation = config._attn_implementation
    plain = implementation in _PLAIN
    if mask.shape == (batch, keys):
        keep = mask != 0
        keep = keep | ~keep.any(dim=-1, keepdim=True)
        if plain:
            return _plain_mask(keep[:, None, None, :], x, implementation)
        if queries == keys:
            result: Tensor | None = create_bidirectional_mask(
                config=config, inputs_embeds=x, attention_mask=keep
            )
            return result
        if "flash" in implementation:  # which takes the last queries: never padding here
            return keep
        raise ValueError(f"passes over some of the columns are not implemented: {implementation!r}")
    if mask.ndim != 4 or mask.shape[2:] != (queries, keys):
        raise ValueError(
            f"attention_mask must be [{batch}, {keys}] or [B, H, {queries}, {keys}], "
            f"got shape {tuple(mask.shape)}"
        )
    if not plain:
        raise ValueError(f"a 4-D attention_mask needs 'eager' or 'sdpa', not {implementation!r}")
    if mask.dtype == torch.bool:
        return _plain_mask(mask | ~mask.any(dim=-1, keepdim=True), x, implementation)
    if not mask.is_floating_point():
        raise ValueError(f"a 4-D attention_mask must be bool or floating point, got {mask.dtype}")
    return mask.clamp(min=_CLOSED).to(x.dtype)


def _plain_mask(keep: Tensor, x: Tensor, implementation: str) -> Tensor:
    if implementation != "eager":
        return keep
    return torch.zeros_like(keep, dtype=x.dtype).masked_fill(~keep, _CLOSED)


def block_causal_mask(config: PretrainedConfig, queries: Columns, keys: Columns, x: Tensor) -> Any:
    """The block-causal mask in the form that the attention implementation takes.

    With ``flex_attention`` a pass over whole sequences, or over copies of blocks, has a
    ``BlockMask``; one over a few columns has a plain mask, for sdpa.

    Raises:
        ValueError: an implementation that takes no masks of this kind.
    """
    implementation = config._attn_implementation
    if implementation not in _PLAIN:
        raise ValueError(
            f"block-causal attention needs 'sdpa', 'eager' or 'flex_attention', "
            f"not {implementation!r}"
        )
    whole = queries.block.shape == keys.block.shape or queries.stream is not None
    if implementation == "flex_attention" and whole:
        return flex_mask(queries, keys)
    visible = dense_mask(queries, keys)
    return _plain_mask(visible | ~visible.any(dim=-1, keepdim=True), x, implementation)
