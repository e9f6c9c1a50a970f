"""Statistics of rows whose vocabulary is cut into shards: local work, exchange, combination."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from egspo_kernels.reference import shards as reference_shards
from egspo_kernels.shared.product import Settings
from egspo_kernels.shared.shards import Gradients, Operands, Partials, Whole, combine
from egspo_kernels.vocab_parallel.exchange import Shard


def shard_rows(*args: Any) -> tuple[Any, ...]:
    """Arguments of ``_ShardRows.forward``: statistics of rows over all shards, the last the KL.

    The log-probability is None without targets and the KL without ``ref_hidden``.
    """
    return _ShardRows.apply(*args)  # type: ignore[no-untyped-call, no-any-return]


class _ShardRows(torch.autograd.Function):
    """One exchange forward; backward another, of the gradient of hidden if that is needed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        settings: Settings,
        shard: Shard,
        backend: str,
    ) -> tuple[Tensor | None, ...]:
        local = None if targets is None else shard.local_targets(targets)
        operands = Operands(hidden, weight, bias, local, ref_hidden, ref_weight)
        partials, argmax = _implementation(backend).shard_partials(operands, settings)
        # [R, 7, N] to seven of [R, N].
        gathered = shard.gather(partials, "forward pass").unbind(1)
        places = shard.gather(argmax + shard.start, "forward pass")
        # The reference tempers its scores, as it does of a whole vocabulary; triton does not.
        scale = 1.0 / settings.temperature if backend == "triton" else 1.0
        rows = combine(Partials(*gathered), places, targets, shard.vocab_size, scale)
        ctx.save_for_backward(*operands, *rows.whole)
        ctx.settings, ctx.shard, ctx.backend = settings, shard, backend
        ctx.mark_non_differentiable(rows.argmax, rows.confidence)
        ctx.set_materialize_grads(False)
        log_prob = None if targets is None else rows.log_prob
        kl = None if ref_hidden is None else rows.kl
        return rows.logsumexp, rows.entropy, log_prob, rows.argmax, rows.confidence, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "vocab_parallel_token_stats and vocab_parallel_stepwise_surrogate are "
                "differentiable once: create_graph=True is not supported"
            )
        operands, whole = Operands(*ctx.saved_tensors[:6]), Whole(*ctx.saved_tensors[6:])
        logsumexp, entropy, log_prob, _, _, kl = grads
        grad_hidden, grad_weight, grad_bias = _implementation(ctx.backend).shard_gradients(
            operands,
            whole,
            Gradients(logsumexp, entropy, log_prob, kl),
            ctx.needs_input_grad[:3],
            ctx.settings,
        )
        if grad_hidden is not None:
            grad_hidden = ctx.shard.sum_over_ranks(grad_hidden, "backward pass")
        return grad_hidden, grad_weight, grad_bias, *(None,) * 6


def _implementation(backend: str) -> ModuleType:
    """The module whose ``shard_partials`` and ``shard_gradients`` run."""
    if backend == "triton":
        from egspo_kernels.triton_kernels import vocab_rows

        return vocab_rows
    return reference_shards
