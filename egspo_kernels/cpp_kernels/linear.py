"""Statistics of rows of logits that are made a chunk at a time from hidden states and a head.

Rows that fit into one chunk keep their logits for the backward pass, which writes the gradient over
them; with more rows than that the logits are made again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from egspo_kernels.cpp_kernels.rows import (
    Coefficients,
    Divergence,
    Normaliser,
    divergence,
    row_gradient,
    token_stats,
)
from egspo_kernels.shared.product import Settings, chunks, product


class Heads(NamedTuple):
    """Hidden states and heads, of the policy and, where an exact KL is wanted, the reference."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None

    def logits(self, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """Of policy and reference; a head that both share is read once for both."""
        hidden, dtype = self.hidden[chunk], self.weight.dtype
        if self.ref_hidden is None or self.ref_weight is None:
            return product(hidden, self.weight, self.bias, dtype), None
        ref_hidden = self.ref_hidden[chunk]
        if self.ref_weight is self.weight:
            both = product(torch.cat([hidden, ref_hidden]), self.weight, self.bias, dtype)
            return both[: len(hidden)], both[len(hidden) :]
        logits = product(hidden, self.weight, self.bias, dtype)
        return logits, product(ref_hidden, self.ref_weight, self.bias, dtype)


def row_bytes(vocab_size: int, dtype: torch.dtype, *, with_reference: bool) -> int:
    """Workspace of one row: its logits, whose place the gradient takes, and the reference's."""
    return dtype.itemsize * (2 if with_reference else 1) * vocab_size


def linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    settings: Settings,
) -> tuple[Any, ...]:
    """Log-sum-exp, entropy, log-probability, argmax, confidence and KL of each row.

    With ``ref_hidden`` only the log-probability and the KL, None in the other places.
    """
    heads = Heads(hidden, weight, bias, ref_hidden, ref_weight)
    keep = torch.is_grad_enabled() and hidden.shape[0] <= settings.chunk_rows
    return _LinearRows.apply(*heads, targets, settings, keep)  # type: ignore[no-untyped-call, no-any-return]


class _LinearRows(torch.autograd.Function):
    """(heads, targets) to per-row statistics, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        targets: Tensor | None,
        settings: Settings,
        keep: bool,
    ) -> tuple[Tensor | None, ...]:
        heads = Heads(hidden, weight, bias, ref_hidden, ref_weight)
        scalars = (settings.temperature, settings.banned_token)
        parts: list[tuple[Tensor | None, ...]] = []
        saved: list[tuple[Tensor | None, ...]] = []
        keep = keep and any(ctx.needs_input_grad[:3])
        ctx.kept = None
        for chunk in chunks(hidden.shape[0], settings.chunk_rows):
            logits, ref_logits = heads.logits(chunk)
            normaliser = Normaliser(*hidden.new_empty((2, len(logits)), dtype=torch.float32))
            target = None if targets is None else targets[chunk]
            if ref_logits is None:
                stats = token_stats(logits, target, None, *scalars, normaliser)
                parts.append((*stats, None))
                saved.append((*normaliser, stats.entropy))
            else:
                assert target is not None
                log_prob, kl, normaliser, between = divergence(logits, ref_logits, target, *scalars)
                parts.append((None, None, log_prob, None, None, kl))
                saved.append((*normaliser, *between))
            if keep:
                ctx.kept = (logits, ref_logits)
        ctx.save_for_backward(*heads, targets, *_joined(saved))
        ctx.settings = settings
        outputs = _joined(parts)
        ctx.mark_non_differentiable(*(x for x in outputs[3:5] if x is not None))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_token_stats and linear_stepwise_surrogate are differentiable once: "
                "create_graph=True is not supported"
            )
        heads, targets = Heads(*ctx.saved_tensors[:5]), ctx.saved_tensors[5]
        saved = ctx.saved_tensors[6:]
        settings: Settings = ctx.settings
        wanted = Coefficients(grads[0], grads[1], grads[2], grads[5])
        gradients = _HeadGradients(heads, ctx.needs_input_grad[:3])
        for chunk in chunks(heads.hidden.shape[0], settings.chunk_rows):
            # The gradient takes the place of the logits: they serve once.
            logits, ref_logits = ctx.kept or heads.logits(chunk)
            ctx.kept = None
            part = [value[chunk] for value in saved]
            paired = ref_logits is not None
            row_gradient(
                logits,
                Normaliser(*part[:2]),
                Coefficients(*(None if g is None else g[chunk] for g in wanted)),
                settings.temperature,
                settings.banned_token,
                targets=None if targets is None else targets[chunk],
                entropy=None if paired else part[2],
                ref_logits=ref_logits,
                divergence=Divergence(*part[2:]) if paired else None,
                out=logits,
            )
            gradients.add(chunk, logits)
        return *gradients.found(), None, None, None, None, None


class _HeadGradients:
    """Sums over chunks of the gradients of hidden, weight and bias; None for one not needed."""

    def __init__(self, heads: Heads, needed: tuple[bool, ...]) -> None:
        self._heads = heads
        self._hidden = torch.empty_like(heads.hidden) if needed[0] else None
        self._weight = torch.zeros_like(heads.weight, dtype=torch.float32) if needed[1] else None
        self._bias = None
        if heads.bias is not None and needed[2]:
            self._bias = torch.zeros_like(heads.bias, dtype=torch.float32)

    def add(self, chunk: slice, gradient: Tensor) -> None:
        """Of logits [n, V]."""
        if self._hidden is not None:
            torch.mm(gradient, self._heads.weight, out=self._hidden[chunk])
        if self._weight is not None:
            self._weight += gradient.t() @ self._heads.hidden[chunk]
        if self._bias is not None:
            self._bias += gradient.sum(0)

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dtype = self._heads.weight.dtype
        return (
            self._hidden,
            None if self._weight is None else self._weight.to(dtype),
            None if self._bias is None else self._bias.to(dtype),
        )


def _joined(parts: list[tuple[Tensor | None, ...]]) -> tuple[Any, ...]:
    """The parts of each column one after another; one part is as it is."""
    if len(parts) == 1:
        return parts[0]
    return tuple(None if c[0] is None else torch.cat(c) for c in zip(*parts, strict=True))
