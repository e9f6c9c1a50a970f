"""The product of hidden states and head weight, a chunk of rows at a time, for every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    temperature: float
    banned_token: int | None
    chunk_rows: int
    """Rows of logits alive at once."""
    logits_dtype: torch.dtype


TILE_ROWS = 128
"""A product works on so many rows at once: a few more cost as much as twice as many."""


def chunk_size(rows: int, chunk_rows: int) -> int:
    """Rows of a chunk, at most ``chunk_rows``: as few chunks as can be, all of about one size.

    Several chunks have whole tiles of rows, if a chunk can hold one.
    """
    if rows <= chunk_rows:
        return rows
    tile = TILE_ROWS if chunk_rows >= TILE_ROWS else 1
    count = -(-rows // (chunk_rows // tile * tile))
    return -(-rows // (count * tile)) * tile


def chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Consecutive slices of :func:`chunk_size` rows; one empty slice where there is no row."""
    size = max(chunk_size(rows, chunk_rows), 1)
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


def product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """``hidden @ weight.T + bias`` in ``dtype``: that of ``hidden``, or float32 on a GPU.

    Autocast was resolved by the caller; it is off here so that the backward pass, which runs
    outside the caller's autocast region, repeats exactly this product.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if dtype != hidden.dtype:
            logits: Tensor = torch.mm(hidden, weight.t(), out_dtype=dtype, out=out)
            return logits if bias is None else logits.add_(bias)
        if out is None:
            return torch.nn.functional.linear(hidden, weight, bias)
        if bias is None:
            return torch.mm(hidden, weight.t(), out=out)
        return torch.addmm(bias, hidden, weight.t(), out=out)
