"""The stepwise surrogate of logits and its gradient, two passes over each row in all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from egspo_kernels.cpp_kernels.rows import (
    Coefficients,
    Divergence,
    Normaliser,
    divergence,
    log_probs,
    row_gradient,
)
from egspo_kernels.shared.objective import Objective, Steps, step_objective
from egspo_kernels.types import Surrogate


def stepwise_surrogate(
    logits: Tensor,
    targets: Tensor,
    steps: Steps,
    ref_logits: Tensor | None,
    objective: Objective,
    temperature: float,
    banned_token: int | None,
    overwrite_logits: bool,
) -> Surrogate:
    """As :func:`egspo_kernels.stepwise_surrogate`, of checked arguments."""
    scalars = (temperature, banned_token)
    if objective.kl == "k3" and steps.ref_log_prob is None:
        assert ref_logits is not None
        with torch.no_grad():
            token_reference, _ = log_probs(ref_logits.detach(), targets, *scalars)
        steps = steps.with_reference(token_reference, objective)
    exact = ref_logits if objective.needs_exact_kl else None
    rows = (logits, targets, exact, *scalars, overwrite_logits)
    log_prob, token_kl = _Function.apply(*rows)  # type: ignore[no-untyped-call]
    return step_objective(objective, log_prob, steps, token_kl)


class _Function(torch.autograd.Function):
    """(logits, targets, reference's logits) to log-probabilities and exact KL of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        ref_logits: Tensor | None,
        temperature: float,
        banned_token: int | None,
        overwrite_logits: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.scalars, ctx.overwrite_logits = (temperature, banned_token), overwrite_logits
        ctx.set_materialize_grads(False)
        if ref_logits is None:
            log_prob, normaliser = log_probs(logits, targets, *ctx.scalars)
            ctx.save_for_backward(logits, targets, None, *normaliser)
            return log_prob, None
        log_prob, kl, normaliser, between = divergence(logits, ref_logits, targets, *ctx.scalars)
        ctx.save_for_backward(logits, targets, ref_logits, *normaliser, *between)
        return log_prob, kl

    @staticmethod
    def backward(
        ctx: Any, grad_log_prob: Tensor | None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "stepwise_surrogate with backend 'cpp' is differentiable once: "
                "create_graph=True is not supported"
            )
        logits, targets, ref_logits, *saved = ctx.saved_tensors
        gradient = row_gradient(
            logits,
            Normaliser(*saved[:2]),
            Coefficients(log_prob=grad_log_prob, kl=grad_kl),
            *ctx.scalars,
            targets=targets,
            ref_logits=ref_logits,
            divergence=Divergence(*saved[2:]) if grad_kl is not None else None,
            out=logits.detach() if ctx.overwrite_logits else None,
        )
        if ctx.overwrite_logits:
            # Whatever else saved the logits must learn of it.
            torch.autograd.graph.increment_version(logits)
        return gradient, None, None, None, None, None
