"""The stepwise surrogate of logits and its gradient, in three stages of kernels.

Row statistics (one pass over the logits, and over the reference's for the exact KL); the loss and a
coefficient per step; in the backward pass one kernel over the rows. That kernel reads the incoming
gradient on the device: nothing here waits for a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from egspo_kernels.shared.objective import Objective, Steps
from egspo_kernels.triton_kernels.kl import Divergence, exact_kl
from egspo_kernels.triton_kernels.normaliser import Normaliser, log_probs
from egspo_kernels.triton_kernels.row_gradient import Coefficients, row_gradient
from egspo_kernels.triton_kernels.steps import step_objective
from egspo_kernels.types import Surrogate

OUTPUTS = len(Surrogate._fields)


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
    if not objective.reads_reference_rows(steps):
        ref_logits = None
    if torch.compiler.is_compiling():
        numbers = (*objective.values(), float(temperature), banned_token)
        return Surrogate(*_operator(logits, targets, *steps, ref_logits, *numbers)[:OUTPUTS])
    call = _Call(targets, steps, ref_logits, objective, temperature, banned_token, overwrite_logits)
    loss = _Function.apply(logits, call)
    return Surrogate(loss, *call.measured)


@dataclasses.dataclass
class _Call:
    """All of an eager call but the logits: autograd looks at every argument and every output."""

    targets: Tensor
    steps: Steps
    ref_logits: Tensor | None
    objective: Objective
    temperature: float
    banned_token: int | None
    overwrite_logits: bool
    measured: Sequence[Tensor] = ()
    """By the forward pass: the surrogate without its loss."""


def _forward(
    logits: Tensor,
    targets: Tensor,
    step_ids: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    weights: Tensor | None,
    ref_log_prob: Tensor | None,
    ref_logits: Tensor | None,
    clip_low: float,
    clip_high: float,
    beta: float,
    kl: str | None,
    aggregation: str,
    temperature: float,
    banned_token: int | None,
) -> list[Tensor]:
    """The fields of :class:`Surrogate`, then what the gradient needs."""
    objective = Objective(clip_low, clip_high, beta, kl, aggregation)  # type: ignore[arg-type]
    steps = Steps(step_ids, old_log_prob, advantage, weights, ref_log_prob)
    surrogate, saved = _surrogate(
        logits, targets, steps, ref_logits, objective, temperature, banned_token
    )
    # An operator returns tensors.
    empty = functools.partial(logits.new_empty, 0, dtype=torch.float32)
    return [*surrogate, *(empty() if each is None else each for each in saved)]


def _surrogate(
    logits: Tensor,
    targets: Tensor,
    steps: Steps,
    ref_logits: Tensor | None,
    objective: Objective,
    temperature: float,
    banned_token: int | None,
) -> tuple[Surrogate, tuple[Tensor | None, ...]]:
    """The surrogate, and what the gradient needs, some of it None where it does not."""
    token_reference = None
    divergence: tuple[Tensor | None, ...] = (None, None)
    if objective.needs_exact_kl:
        assert ref_logits is not None
        log_prob, token_reference, normaliser, divergence = exact_kl(
            logits, ref_logits, targets, temperature, banned_token
        )
    else:
        log_prob, normaliser = log_probs(logits, targets, temperature, banned_token)
        if ref_logits is not None:
            token_reference, _ = log_probs(ref_logits, targets, temperature, banned_token)
    surrogate, coefficient, kl_coefficient = step_objective(
        objective, log_prob, token_reference, steps
    )
    return surrogate, (*normaliser, *divergence, coefficient, kl_coefficient)


def _backward(
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    step_ids: Tensor,
    ref_logits: Tensor | None,
    saved: list[Tensor],
    temperature: float,
    banned_token: int | None,
) -> Tensor:
    return _gradient(
        grad_loss, logits, targets, step_ids, ref_logits, saved, temperature, banned_token, None
    )


def _gradient(
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    step_ids: Tensor,
    ref_logits: Tensor | None,
    saved: Sequence[Any],
    temperature: float,
    banned_token: int | None,
    out: Tensor | None,
) -> Tensor:
    """``ref_logits`` is None where the KL has no part in the loss, or is not the exact one."""
    maximum, log_total, ref_maximum, mean_difference, coefficient, kl_coefficient = saved
    return row_gradient(
        logits,
        Normaliser(maximum, log_total),
        Coefficients(coefficient, kl=None if ref_logits is None else kl_coefficient),
        temperature,
        banned_token,
        targets=targets,
        ref_logits=ref_logits,
        divergence=None if ref_logits is None else Divergence(ref_maximum, mean_difference),
        step_ids=step_ids,
        scale=grad_loss,
        out=out,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    """Of the arguments of ``_forward`` and its results, keeps what ``_backward`` takes."""
    logits, targets, step_ids, *_, ref_logits = inputs[:8]
    beta, kl, _, ctx.temperature, ctx.banned_token = inputs[10:15]
    if kl != "exact" or beta == 0:
        ref_logits = None
    ctx.save_for_backward(logits, targets, step_ids, ref_logits, *output[OUTPUTS:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


class _Function(torch.autograd.Function):
    """Calls the launchers directly: eagerly, an operator would take longer than they do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> Tensor:
        surrogate, saved = _surrogate(
            logits,
            call.targets,
            call.steps,
            call.ref_logits,
            call.objective,
            call.temperature,
            call.banned_token,
        )
        loss, *call.measured = surrogate
        objective = call.objective
        ref_logits = call.ref_logits if objective.needs_exact_kl and objective.beta > 0 else None
        ctx.save_for_backward(logits, call.targets, call.steps.step_ids, ref_logits)
        ctx.saved = saved  # nobody else knows these
        ctx.scalars = call.temperature, call.banned_token
        ctx.overwrite_logits = call.overwrite_logits
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "stepwise_surrogate with backend 'triton' is differentiable once: "
                "create_graph=True is not supported"
            )
        logits, targets, step_ids, ref_logits = ctx.saved_tensors
        temperature, banned_token = ctx.scalars
        out = logits.detach() if ctx.overwrite_logits else None
        gradient = _gradient(
            grad_loss,
            logits,
            targets,
            step_ids,
            ref_logits,
            ctx.saved,
            temperature,
            banned_token,
            out,
        )
        if ctx.overwrite_logits:
            # Whatever else saved the logits must learn of it.
            torch.autograd.graph.increment_version(logits)
        return gradient, None


# The same under torch.compile.
_operator = custom_op("egspo::stepwise_surrogate", _forward, mutates_args=())
_backward_operator = custom_op("egspo::stepwise_surrogate_backward", _backward, mutates_args=())


def fake_outputs(rows: Tensor, num_steps: int, exact: bool) -> list[Tensor]:
    """Shapes of what ``_forward`` returns, for as many rows as those given."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return rows.new_empty(shape, dtype=dtype)

    steps = [empty(num_steps) for _ in range(5)]
    clipped = [empty(num_steps, dtype=torch.bool) for _ in range(2)]
    normaliser = [empty(rows.shape[0]) for _ in range(2)]
    divergence = [empty(rows.shape[0] if exact else 0) for _ in range(2)]
    clamped = empty(dtype=torch.int64)
    return [empty(), *steps[:3], *clipped, clamped, *normaliser, *divergence, *steps[3:]]


@_operator.register_fake
def _(logits: Tensor, *arguments: Any) -> list[Tensor]:
    return fake_outputs(logits, num_steps=arguments[2].shape[0], exact=arguments[10] == "exact")


@_backward_operator.register_fake
def _(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _operator_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    logits, targets, step_ids, ref_logits, *saved = ctx.saved_tensors
    gradient = _backward_operator(
        grads[0],
        logits,
        targets,
        step_ids,
        ref_logits,
        saved,
        ctx.temperature,
        ctx.banned_token,
    )
    return gradient, *(None for _ in ctx.needs_input_grad[1:])


_operator.register_autograd(_operator_backward, setup_context=_setup_context)
