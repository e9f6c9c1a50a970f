"""The stepwise surrogate of hidden states, by the chunks of :mod:`.linear`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from egspo_kernels.shared.objective import Objective, Steps
from egspo_kernels.shared.product import Settings, chunks
from egspo_kernels.triton_kernels.kl import Divergence, exact_kl
from egspo_kernels.triton_kernels.linear import (
    Head,
    chunk_logits,
    fake_head_gradients,
    head_gradients,
    joined,
    logits_buffer,
    needed_gradients,
    refuse_double_backward,
)
from egspo_kernels.triton_kernels.normaliser import Normaliser, log_probs
from egspo_kernels.triton_kernels.row_gradient import Coefficients, row_gradient
from egspo_kernels.triton_kernels.steps import step_objective
from egspo_kernels.triton_kernels.surrogate import OUTPUTS, fake_outputs
from egspo_kernels.types import Surrogate


def linear_stepwise_surrogate(
    head: Head,
    targets: Tensor,
    steps: Steps,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    objective: Objective,
    settings: Settings,
) -> Surrogate:
    """As :func:`egspo_kernels.linear_stepwise_surrogate`, of checked arguments."""
    if not objective.reads_reference_rows(steps):
        ref_hidden = ref_weight = None
    arguments = (*head, targets, *steps, ref_hidden, ref_weight, *objective.values(), *settings)
    if torch.compiler.is_compiling():
        outputs = _operator(*arguments)
    else:
        outputs = _Function.apply(*arguments)
    return Surrogate(*outputs[:OUTPUTS])


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    step_ids: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    weights: Tensor | None,
    ref_log_prob: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    clip_low: float,
    clip_high: float,
    beta: float,
    kl: str | None,
    aggregation: str,
    temperature: float,
    banned_token: int | None,
    chunk_rows: int,
    logits_dtype: torch.dtype,
) -> list[Tensor]:
    """The fields of :class:`Surrogate`, then what the gradient needs."""
    objective = Objective(clip_low, clip_high, beta, kl, aggregation)  # type: ignore[arg-type]
    settings = Settings(temperature, banned_token, chunk_rows, logits_dtype)
    head, ref_head = Head(hidden, weight, bias), _ref_head(ref_hidden, ref_weight, bias)
    values = _row_statistics(head, ref_head, targets, settings, exact=kl == "exact")
    log_prob, token_reference, *saved = values
    steps = Steps(step_ids, old_log_prob, advantage, weights, ref_log_prob)
    surrogate, coefficient, kl_coefficient = step_objective(
        objective, log_prob, None if ref_head is None else token_reference, steps
    )
    return [*surrogate, *saved, coefficient, kl_coefficient]


def _ref_head(
    ref_hidden: Tensor | None, ref_weight: Tensor | None, bias: Tensor | None
) -> Head | None:
    if ref_hidden is None or ref_weight is None:
        return None
    return Head(ref_hidden, ref_weight, bias)


def _row_statistics(
    head: Head, ref_head: Head | None, targets: Tensor, settings: Settings, exact: bool
) -> list[Tensor]:
    """Log-probability, reference statistic (KL if exact), normaliser, divergence: [N] or empty."""
    scalars = (settings.temperature, settings.banned_token)
    buffer = logits_buffer(head, settings)
    ref_buffer = torch.empty_like(buffer) if exact else buffer
    parts: list[list[Tensor]] = []
    for chunk in chunks(head.hidden.shape[0], settings.chunk_rows):
        logits = chunk_logits(head, settings, chunk, buffer)
        if exact:
            assert ref_head is not None
            ref_logits = chunk_logits(ref_head, settings, chunk, ref_buffer)
            log_prob, kl, normaliser, divergence = exact_kl(
                logits, ref_logits, targets[chunk], *scalars
            )
            parts.append([log_prob, kl, *normaliser, *divergence])
            continue
        log_prob, normaliser = log_probs(logits, targets[chunk], *scalars)
        # An operator may not return one tensor twice: each place-holder is its own.
        ref_log_prob, *nothing = (torch.empty(0, device=logits.device) for _ in range(3))
        if ref_head is not None:
            ref_logits = chunk_logits(ref_head, settings, chunk, ref_buffer)  # in the same memory
            ref_log_prob, _ = log_probs(ref_logits, targets[chunk], *scalars)
        parts.append([log_prob, ref_log_prob, *normaliser, *nothing])
    return joined(parts)


def _backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    step_ids: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    saved: list[Tensor],
    needed: list[bool],
    temperature: float,
    banned_token: int | None,
    chunk_rows: int,
    logits_dtype: torch.dtype,
) -> list[Tensor]:
    """``ref_hidden`` is None where the KL has no part in the loss, or is not the exact one."""
    settings = Settings(temperature, banned_token, chunk_rows, logits_dtype)
    head, ref_head = Head(hidden, weight, bias), _ref_head(ref_hidden, ref_weight, bias)
    ref_buffer = None if ref_head is None else logits_buffer(ref_head, settings)
    maximum, log_total, ref_maximum, mean_difference, coefficient, kl_coefficient = saved

    def logits_gradient(chunk: slice, logits: Tensor, out: Tensor) -> None:
        ref_logits = divergence = None
        if ref_head is not None and ref_buffer is not None:
            ref_logits = chunk_logits(ref_head, settings, chunk, ref_buffer)
            divergence = Divergence(ref_maximum[chunk], mean_difference[chunk])
        row_gradient(
            logits,
            Normaliser(maximum[chunk], log_total[chunk]),
            Coefficients(coefficient, kl=None if ref_head is None else kl_coefficient),
            temperature,
            banned_token,
            targets=targets[chunk],
            ref_logits=ref_logits,
            divergence=divergence,
            step_ids=step_ids[chunk],
            scale=grad_loss,
            out=out,
        )

    return head_gradients(head, needed, settings, logits_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    hidden, weight, bias, targets, step_ids = inputs[:5]
    ref_hidden, ref_weight, _, _, beta, kl, _, *ctx.settings = inputs[9:]
    if kl != "exact" or beta == 0:
        ref_hidden = ref_weight = None
    ctx.save_for_backward(
        hidden, weight, bias, targets, step_ids, ref_hidden, ref_weight, *output[OUTPUTS:]
    )
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _call_backward(
    ctx: Any, grad_loss: Tensor | None, run: Callable[..., list[Tensor]]
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    return needed_gradients(
        ctx, run(grad_loss, *tensors[:7], list(tensors[7:]), needed, *ctx.settings)
    )


class _Function(torch.autograd.Function):
    """Calls the launchers directly: eagerly, an operator would take longer than they do."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        outputs = tuple(_forward(*arguments))
        _setup_context(ctx, arguments, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        return _call_backward(ctx, grad_loss, _backward)


# The same under torch.compile.
_operator = custom_op("egspo::linear_stepwise_surrogate", _forward, mutates_args=())
_backward_operator = custom_op(
    "egspo::linear_stepwise_surrogate_backward", _backward, mutates_args=()
)


@_operator.register_fake
def _(hidden: Tensor, *arguments: Any) -> list[Tensor]:
    return fake_outputs(hidden, num_steps=arguments[4].shape[0], exact=arguments[13] == "exact")


@_backward_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return fake_head_gradients(Head(*arguments[1:4]), arguments[9])


def _operator_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return _call_backward(ctx, grads[0], _backward_operator)


_operator.register_autograd(_operator_backward, setup_context=_setup_context)
