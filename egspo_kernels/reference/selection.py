"""The order of the steps, by two stable sorts."""

from __future__ import annotations

import torch
from torch import Tensor


def within(entropy: Tensor, limits: Tensor | None) -> Tensor:
    """bool [B, T]: which steps lie before their row's limit."""
    if limits is None:
        return torch.ones_like(entropy, dtype=torch.bool)
    return torch.arange(entropy.shape[1], device=entropy.device) < limits.unsqueeze(1)


def select_steps(entropy: Tensor, candidate: Tensor, k: int) -> Tensor:
    """int64 [B, k]: the best candidates, best first, then -1."""
    # Ascending order of the negated value puts NaN last, and a stable sort ties to the earlier
    # step. `0 - x` rather than `-x`: it leaves one zero, whatever a device's sort makes of two.
    order = (0.0 - entropy).sort(dim=1, stable=True).indices
    candidates_first = (~candidate).gather(1, order).byte().sort(dim=1, stable=True).indices
    selected = order.gather(1, candidates_first[:, :k])
    rank = torch.arange(k, device=entropy.device)
    return selected.masked_fill(rank >= candidate.sum(1, keepdim=True), -1)


def step_entropy(
    token_entropy: Tensor, step_ids: Tensor, num_steps: int, reduce: str
) -> tuple[Tensor, Tensor]:
    """float64 [B, T] entropy of each step, and bool [B, T]: whether it has a token."""
    ignored = (step_ids < 0) | (step_ids >= num_steps)
    bins = step_ids.masked_fill(ignored, num_steps)  # one more bin takes the ignored tokens
    values = token_entropy.double()
    empty = values.new_zeros(len(values), num_steps + 1)
    sums = empty.scatter_add(1, bins, values)[:, :-1]
    counts = empty.scatter_add(1, bins, torch.ones_like(values))[:, :-1]
    return (sums if reduce == "sum" else sums / counts.clamp(min=1)), counts > 0
