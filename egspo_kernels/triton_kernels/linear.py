"""Statistics and surrogate of hidden states: chunks of logits in one buffer, of which one pass.

The backward pass repeats the product of a chunk, turns the logits into their gradient in place and
multiplies it back. Both passes use the same chunks, so that the logits repeat to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from egspo_kernels.shared.product import Settings, chunk_size, chunks, product
from egspo_kernels.triton_kernels import rows as row_kernels
from egspo_kernels.triton_kernels.kl import PARTIALS
from egspo_kernels.triton_kernels.launch import segment_count
from egspo_kernels.triton_kernels.normaliser import Normaliser
from egspo_kernels.triton_kernels.row_gradient import Coefficients, row_gradient
from egspo_kernels.types import TokenStats

STATS = len(TokenStats._fields)


class Head(NamedTuple):
    """The operands of the product, in its dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def row_bytes(
    vocab_size: int,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    *,
    with_reference: bool,
    with_gradient: bool,
) -> int:
    """Workspace of one row: its logits, the reference's, the gradient, the partial sums.

    The gradient takes the place of logits of its dtype, that of the weight.
    """
    columns = logits_dtype.itemsize * (2 if with_reference else 1)
    if with_gradient and logits_dtype != dtype:
        columns += dtype.itemsize
    return columns * vocab_size + 4 * PARTIALS * segment_count(vocab_size)


def logits_buffer(head: Head, settings: Settings) -> Tensor:
    rows = chunk_size(head.hidden.shape[0], settings.chunk_rows)
    return head.hidden.new_empty((rows, head.weight.shape[0]), dtype=settings.logits_dtype)


def chunk_logits(head: Head, settings: Settings, chunk: slice, buffer: Tensor) -> Tensor:
    """Logits of a chunk of rows, written to the start of ``buffer``."""
    hidden = head.hidden[chunk]
    out = buffer[: hidden.shape[0]]
    return product(hidden, head.weight, head.bias, settings.logits_dtype, out)


def head_gradients(
    head: Head,
    needed: Sequence[bool],
    settings: Settings,
    logits_gradient: Callable[[slice, Tensor, Tensor], None],
) -> list[Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for one that is not needed.

    Args:
        logits_gradient: called with a chunk, its logits and where to write their gradient, which
            may be the same memory.
    """
    hidden, weight, _ = head
    # An operator may not return one tensor twice: each place-holder is its own.
    grad_hidden = hidden.new_empty(hidden.shape if needed[0] else 0)
    # Summed over chunks in float32.
    grad_weight = weight.new_zeros(weight.shape if needed[1] else 0, dtype=torch.float32)
    grad_bias = weight.new_zeros(weight.shape[0] if needed[2] else 0, dtype=torch.float32)
    buffer = logits_buffer(head, settings)
    apart = torch.empty_like(buffer, dtype=weight.dtype) if buffer.dtype != weight.dtype else buffer
    for chunk in chunks(hidden.shape[0], settings.chunk_rows):
        logits = chunk_logits(head, settings, chunk, buffer)
        gradient = apart[: logits.shape[0]]
        logits_gradient(chunk, logits, gradient)
        if needed[0]:
            torch.mm(gradient, weight, out=grad_hidden[chunk])
        if needed[1]:
            grad_weight += gradient.t() @ hidden[chunk]
        if needed[2]:
            grad_bias += gradient.sum(0, dtype=torch.float32)
    return [grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)]


def needed_gradients(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What a backward function returns for ``gradients`` of hidden, weight and bias."""
    needs = ctx.needs_input_grad
    first = tuple(g if need else None for g, need in zip(gradients, needs[:3], strict=True))
    return first + (None,) * (len(needs) - 3)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_token_stats and linear_stepwise_surrogate are differentiable once: "
            "create_graph=True is not supported"
        )


def linear_token_stats(
    head: Head, targets: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """As :func:`egspo_kernels.linear_token_stats`, of checked arguments."""
    arguments = (*head, targets, *settings)
    if torch.compiler.is_compiling():
        outputs = _operator(*arguments)
    else:
        outputs = _Function.apply(*arguments)
    logsumexp, entropy, log_prob, argmax, confidence = outputs[:STATS]
    return logsumexp, entropy, None if targets is None else log_prob, argmax, confidence


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    temperature: float,
    banned_token: int | None,
    chunk_rows: int,
    logits_dtype: torch.dtype,
) -> list[Tensor]:
    """The fields of :class:`TokenStats` (empty where None), then the normaliser."""
    head = Head(hidden, weight, bias)
    settings = Settings(temperature, banned_token, chunk_rows, logits_dtype)
    buffer = logits_buffer(head, settings)
    parts: list[list[Tensor]] = []
    for chunk in chunks(hidden.shape[0], chunk_rows):
        logits = chunk_logits(head, settings, chunk, buffer)
        stats = row_kernels.token_stats(
            logits, None if targets is None else targets[chunk], None, temperature, banned_token
        )
        logsumexp, entropy, log_prob, argmax, confidence = stats
        if log_prob is None:
            log_prob = entropy.new_empty(0)
        maximum = logits.gather(1, argmax[:, None])[:, 0].float()
        log_total = -confidence.log()  # the most probable token is at the maximum
        parts.append([logsumexp, entropy, log_prob, argmax, confidence, maximum, log_total])
    return joined(parts)


def joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """What the chunks have, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def _backward(
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_prob: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    entropy: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    needed: list[bool],
    temperature: float,
    banned_token: int | None,
    chunk_rows: int,
    logits_dtype: torch.dtype,
) -> list[Tensor]:
    def part(values: Tensor | None, chunk: slice) -> Tensor | None:
        return None if values is None else values[chunk]

    def logits_gradient(chunk: slice, logits: Tensor, out: Tensor) -> None:
        row_gradient(
            logits,
            Normaliser(maximum[chunk], log_total[chunk]),
            Coefficients(
                part(grad_log_prob, chunk), part(grad_logsumexp, chunk), part(grad_entropy, chunk)
            ),
            temperature,
            banned_token,
            targets=part(targets, chunk),
            entropy=entropy[chunk],
            out=out,
        )

    settings = Settings(temperature, banned_token, chunk_rows, logits_dtype)
    return head_gradients(Head(hidden, weight, bias), needed, settings, logits_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    hidden, weight, bias, targets, *ctx.settings = inputs
    _, entropy, _, *others = output
    ctx.save_for_backward(hidden, weight, bias, targets, entropy, *others[-2:])
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _call_backward(
    ctx: Any, grads: Sequence[Tensor | None], run: Callable[..., list[Tensor]]
) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    if ctx.saved_tensors[3] is None:
        grads = [*grads[:2], None]  # of the place-holder for log-probabilities
    return needed_gradients(ctx, run(*grads[:3], *ctx.saved_tensors, needed, *ctx.settings))


class _Function(torch.autograd.Function):
    """Calls the launchers directly: eagerly, an operator would take longer than they do."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        outputs = tuple(_forward(*arguments))
        _setup_context(ctx, arguments, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        return _call_backward(ctx, grads, _backward)


# The same under torch.compile.
_operator = custom_op("egspo::linear_token_stats", _forward, mutates_args=())
_backward_operator = custom_op("egspo::linear_token_stats_backward", _backward, mutates_args=())


@_operator.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, targets: Any, *settings: Any) -> list[Tensor]:
    rows = hidden.shape[0]
    outputs = [hidden.new_empty(rows, dtype=torch.float32) for _ in range(STATS + 2)]
    outputs[3] = hidden.new_empty(rows, dtype=torch.int64)
    if targets is None:
        outputs[2] = hidden.new_empty(0, dtype=torch.float32)
    return outputs


def fake_head_gradients(head: Head, needed: Sequence[bool]) -> list[Tensor]:
    """Shapes of :func:`head_gradients`."""
    operands = (head.hidden, head.weight, head.weight[:, 0])
    return [
        operand.new_empty(operand.shape if need else (0,))
        for operand, need in zip(operands, needed, strict=True)
    ]


@_backward_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return fake_head_gradients(Head(*arguments[3:6]), arguments[10])


def _operator_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return _call_backward(ctx, grads, _backward_operator)


_operator.register_autograd(_operator_backward, setup_context=_setup_context)
