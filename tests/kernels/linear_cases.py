"""Problems for the backends of the linear forms."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from egspo_kernels import (
    Surrogate,
    TokenStats,
    last_backend,
    linear_stepwise_surrogate,
    linear_token_stats,
)
from tests.kernels.surrogate_cases import DEVICE

DIM, BANNED, TEMPERATURE = 8, 3, 0.7


@dataclasses.dataclass
class Head:
    """Hidden states and a head, of the policy and of the reference."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor

    @classmethod
    def make(
        cls, rows: int, vocab: int, dtype: torch.dtype = torch.float32, bias: bool = True
    ) -> Head:
        generator = torch.Generator().manual_seed(rows * 131 + vocab)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

        hidden, weight = normal(rows, DIM), normal(vocab, DIM)
        targets = torch.randint(BANNED + 1, vocab, (rows,), generator=generator).to(DEVICE)
        return cls(
            hidden,
            weight,
            normal(vocab) if bias else None,
            targets,
            hidden + 0.2 * normal(rows, DIM),
            weight + 0.1 * normal(vocab, DIM),
        )

    def to(self, dtype: torch.dtype) -> Head:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        floating = {k: v.to(dtype) for k, v in values.items() if v is not None and k != "targets"}
        return dataclasses.replace(self, **floating)

    def operands(self, bias: bool = True) -> list[Tensor]:
        """Leaves that require a gradient."""
        tensors = [self.hidden, self.weight, self.bias if bias else None]
        return [t.detach().requires_grad_() for t in tensors if t is not None]


def statistics(
    head: Head, backend: str, targets: Tensor | None, **options: Any
) -> tuple[TokenStats, tuple[Tensor, ...]]:
    """Statistics, and the gradients of a mixture of those that have one."""
    hidden, weight, *bias = operands = head.operands()
    stats = linear_token_stats(
        hidden,
        weight,
        targets,
        bias=bias[0] if bias else None,
        temperature=TEMPERATURE,
        banned_token=BANNED,
        backend=backend,
        **options,
    )
    assert last_backend("linear_token_stats") == backend
    places = torch.arange(len(stats.entropy), device=DEVICE) + 1
    loss = (stats.entropy * places).sum() + (stats.logsumexp[:2] / 3).sum()
    if stats.log_prob is not None:
        loss = loss - 2 * (stats.log_prob * places.flip(0)).sum()
    return stats, torch.autograd.grad(loss, operands)


def chunks_of(rows: int, vocab: int, dtype: torch.dtype, *, reference: bool = False) -> int:
    """A workspace for so many rows with Triton."""
    per_row = dtype.itemsize * vocab * (2 if reference else 1) + 20 * -(-vocab // 8192)
    return rows * per_row


def surrogate(
    head: Head, backend: str, kl: str | None, aggregation: str = "sum", **options: Any
) -> tuple[Surrogate, tuple[Tensor, ...]]:
    """Five rows in three steps, the last empty; and the gradients."""
    hidden, weight, *bias = operands = head.operands(bias=kl is None)
    result = linear_stepwise_surrogate(
        hidden,
        weight,
        head.targets,
        torch.tensor([1, 0, 0, 1, 1], device=DEVICE),
        torch.tensor([-12.0, -20.0, 0.1], device=DEVICE),
        torch.tensor([1.0, -2.0, 0.5], device=DEVICE),
        bias=bias[0] if bias else None,
        clip_low=1.0,
        clip_high=100.0,
        kl=kl,
        beta=options.pop("beta", 0.3 if kl else 0.0),
        ref_hidden=head.ref_hidden if kl else None,
        ref_weight=head.ref_weight if kl else None,
        temperature=TEMPERATURE,
        banned_token=BANNED,
        aggregation=aggregation,
        backend=backend,
        **options,
    )
    assert last_backend("linear_stepwise_surrogate") == backend
    return result, torch.autograd.grad(result.loss, operands)
