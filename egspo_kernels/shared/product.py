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


def chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Consecutive slices of at most ``chunk_rows`` rows; one empty slice where there is no row."""
    for start in range(0, max(rows, 1), chunk_rows):
        yield slice(start, min(start + chunk_rows, rows))


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
