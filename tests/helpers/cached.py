"""Cached decoding written out for one sequence: no batch, no masks, no code of the package."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo.models import LLaDAForMaskedLM


def cached_hidden(
    model: LLaDAForMaskedLM, built_ids: Tensor, ids: Tensor, columns: Tensor
) -> Tensor:
    """Hidden states [N, D] at ``columns`` int64 [N] of the sequence ``ids`` int64 [S].

    All other columns have the keys and values that a full pass over ``built_ids`` gives them.
    """
    transformer, config = model.model.transformer, model.config
    everywhere = torch.arange(len(ids))
    built, fresh = transformer.wte(built_ids), transformer.wte(ids[columns])
    for block in transformer.blocks:
        queries, keys, values = _projected(block, config, built, everywhere)
        fresh_queries, fresh_keys, fresh_values = _projected(block, config, fresh, columns)
        keys_now = keys.index_copy(0, columns, fresh_keys)
        values_now = values.index_copy(0, columns, fresh_values)
        built = _finish(block, built, _attend(queries, keys, values))
        fresh = _finish(block, fresh, _attend(fresh_queries, keys_now, values_now))
    return _norm(transformer.ln_f, fresh)


def _norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()


def _projected(block, config, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated as complex numbers, and values: [N, H, head_dim]."""
    normed, dim = _norm(block.attn_norm, x), config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turn = torch.polar(torch.ones(()).double(), 1.0 * positions[:, None].double() * frequency)

    def rotated(tensor: Tensor) -> Tensor:
        first, second = tensor.view(len(x), -1, dim).chunk(2, dim=-1)
        turned = torch.complex(first.double(), second.double()) * turn[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)

    values = block.v_proj(normed).view(len(x), -1, dim)
    return rotated(block.q_proj(normed)), rotated(block.k_proj(normed)), values


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)


def _finish(block, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.attn_out(attended)
    normed = _norm(block.ff_norm, x)
    gate = block.ff_proj(normed)
    return x + block.ff_out(gate * torch.sigmoid(gate) * block.up_proj(normed))
