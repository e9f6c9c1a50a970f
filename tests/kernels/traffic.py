"""Counts the bytes that Triton kernels read and write while they run in the interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from egspo_kernels import linear_token_stats, sample_tokens, stepwise_surrogate, token_stats

LLADA = 126464


@dataclasses.dataclass
class Traffic:
    """Bytes of global memory, masked-out elements left out."""

    read: int = 0
    written: int = 0


@contextmanager
def counted() -> Iterator[Traffic]:
    """Inside, every load and store of the interpreter counts."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)

    def counting_load(self: Any, pointers: Any, mask: Any, *arguments: Any) -> Any:
        traffic.read += size(pointers, mask)
        return load(self, pointers, mask, *arguments)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *arguments: Any) -> Any:
        traffic.written += size(pointers, mask)
        return store(self, pointers, value, mask, *arguments)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield traffic


@dataclasses.dataclass(frozen=True)
class Case:
    """A pass of a function over N rows of logits, and what it cannot do without."""

    name: str
    reads: int
    """Numbers for each logit that must be read: 1 for one pass over one row."""
    writes: int
    run: Callable[[Tensor, Tensor], Callable[[], object]]
    """Of logits and reference logits [N, V]: makes the call that is counted."""


def _surrogate(
    kl: str | None, *, advantage: float = 1.0, backward: bool = False, reference: bool = False
) -> Callable[..., Any]:
    """Forward, or only backward; ``reference`` gives the reference policy's logits, as the exact KL
    needs them."""
    rows = reference or kl == "exact"

    def make(logits: Tensor, ref_logits: Tensor) -> Callable[[], object]:
        count = logits.shape[0]
        index, zeros = torch.arange(count), torch.zeros(count)

        def forward() -> Tensor:
            loss: Tensor = stepwise_surrogate(
                logits.requires_grad_(),
                index,
                index,
                zeros - 11.0,  # of the order of the log-probability: nothing is clipped
                zeros + advantage,
                kl=kl,  # type: ignore[arg-type]
                beta=0.1 if kl else 0.0,
                ref_logits=ref_logits if rows else None,
                ref_log_prob=None if rows or kl is None else zeros - 11.0,
                clip_low=1.0,
                clip_high=100.0,
                backend="triton",
            ).loss
            return loss

        if not backward:
            return forward
        loss = forward()
        return lambda: loss.backward()  # type: ignore[no-untyped-call]

    return make


def _linear(*, backward: bool) -> Callable[..., Any]:
    """The matrix products are not counted, only what is done with the logits."""

    def make(logits: Tensor, _: Tensor) -> Callable[[], object]:
        rows = logits.shape[0]
        hidden, weight = logits[:, :rows].contiguous().requires_grad_(), logits.t().contiguous()

        def forward() -> Tensor:
            stats = linear_token_stats(hidden, weight, torch.arange(rows), backend="triton")
            assert stats.log_prob is not None
            return stats.log_prob.sum() + stats.entropy.sum()

        if not backward:
            return forward
        total = forward()
        return lambda: total.backward()  # type: ignore[no-untyped-call]

    return make


CASES = (
    Case("token_stats", 1, 0, lambda x, _: lambda: token_stats(x, None, backend="triton")),
    Case(
        "sample_tokens",
        1,
        0,
        lambda x, _: (
            lambda: sample_tokens(
                x,
                temperature=0.9,
                seed=0,
                step=0,
                row_ids=torch.arange(len(x)),
                backend="triton",
            )
        ),
    ),
    Case("linear_token_stats", 1, 0, _linear(backward=False)),
    Case("linear_token_stats, backward", 1, 1, _linear(backward=True)),
    Case("stepwise_surrogate", 1, 0, _surrogate(None)),
    Case("stepwise_surrogate, backward", 1, 1, _surrogate(None, backward=True)),
    Case(
        "stepwise_surrogate, backward of clipped rows",
        0,
        1,
        _surrogate(None, advantage=0.0, backward=True),
    ),
    Case("stepwise_surrogate, k3", 1, 0, _surrogate("k3")),
    Case("stepwise_surrogate, k3 of reference logits", 2, 0, _surrogate("k3", reference=True)),
    Case("stepwise_surrogate, exact KL", 2, 0, _surrogate("exact")),
    Case("stepwise_surrogate, exact KL, backward", 2, 1, _surrogate("exact", backward=True)),
)


def measured(case: Case, dtype: torch.dtype, vocabulary: int = LLADA, rows: int = 2) -> Traffic:
    """Bytes of one call."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = (
        torch.randn(rows, vocabulary, generator=generator).to(dtype) for _ in range(2)
    )
    call = case.run(logits, ref_logits)
    with counted() as traffic:
        call()
    return traffic
