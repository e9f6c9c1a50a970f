"""Block-causal attention: who sees whom, from the block and the stream of every column.

Positions are counted from the first token that is not padding; the block of a position is
``position // block_size``. A position attends to every position of its own and of earlier blocks
and to none of later ones.

A pass may carry, behind the *clean* columns of a sequence (stream 0), copies of some of its blocks
with other tokens in them (streams 1, 2, ...): a copy of block ``b`` attends to the clean blocks
before ``b`` and to itself, and nobody else attends to it. So every state of a trajectory fits into
one pass, and so does the supervised loss of all its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """The columns of a pass, or those that it attends to."""

    block: Tensor
    """int64 [B, N]."""
    stream: Tensor | None = None
    """int64 [B, N], 0 for clean columns; None where all are."""
    real: Tensor | None = None
    """bool [B, N], False at padding; None where nothing is padded."""

    def take(self, columns: Tensor) -> Columns:
        """Those at int64 [B, n]."""
        parts = (self.block, self.stream, self.real)
        return Columns(*(None if part is None else part.gather(1, columns) for part in parts))  # type: ignore[arg-type]


def positions_of(attention_mask: Tensor | None, like: Tensor, length: int) -> Tensor:
    """int64 [B, S] positions counted from the first token that is not padding.

    Args:
        attention_mask: [B, S], zero or False at padding; None where nothing is padded.
        like: anything of the batch, [B, ...].
        length: S.
    """
    if attention_mask is None:
        every = torch.arange(length, device=like.device)
        return every.expand(like.shape[0], -1)
    return ((attention_mask != 0).cumsum(1) - 1).clamp(min=0)


def dense_mask(queries: Columns, keys: Columns) -> Tensor:
    """bool [B, 1, N, S], True where a query attends to a key.

    A query at padding attends to what its block does.
    """
    earlier = keys.block[:, None, :] < queries.block[:, :, None]
    same = keys.block[:, None, :] == queries.block[:, :, None]
    if queries.stream is None or keys.stream is None:
        visible = earlier | same
    else:
        theirs, own = keys.stream[:, None, :], queries.stream[:, :, None]
        visible = (earlier & (theirs == 0)) | (same & (theirs == own))
    if keys.real is not None:
        visible = visible & keys.real[:, None, :]
    return visible[:, None]


def flex_mask(queries: Columns, keys: Columns) -> Any:
    """The same as :func:`dense_mask`, as a ``BlockMask`` of ``flex_attention``."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = queries.block.shape
    device = queries.block.device
    clean = torch.zeros_like(queries.block), torch.zeros_like(keys.block)
    own = clean[0] if queries.stream is None else queries.stream
    theirs = clean[1] if keys.stream is None else keys.stream
    real = torch.ones_like(keys.block, dtype=torch.bool) if keys.real is None else keys.real
    query_block, key_block = queries.block, keys.block

    def visible(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        earlier = (key_block[b, k] < query_block[b, q]) & (theirs[b, k] == 0)
        same = (key_block[b, k] == query_block[b, q]) & (theirs[b, k] == own[b, q])
        return real[b, k] & (earlier | same)

    return create_block_mask(visible, batch, None, length, key_block.shape[1], device=str(device))
