"""Statistics and surrogate from hidden states and a head whose rows are spread over ranks.

Only a few numbers per row cross ranks, and in the backward pass the gradient of the hidden states.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from egspo_kernels.checks.arguments import check_banned, check_index, check_vector, refuse_float64
from egspo_kernels.checks.linear import check_linear, check_ref
from egspo_kernels.dispatch.backend import Dispatcher, always_available, triton_probe
from egspo_kernels.shared.objective import (
    KL,
    Aggregation,
    Objective,
    Steps,
    check_reference,
    check_steps,
    step_objective,
)
from egspo_kernels.shared.product import Settings
from egspo_kernels.types import Surrogate, TokenStats
from egspo_kernels.vocab_parallel.exchange import Agreement, Shard, agreement
from egspo_kernels.vocab_parallel.rows import shard_rows
from egspo_kernels.workspace import DEFAULT_WORKSPACE_BYTES, linear_settings

_Function = TypeVar("_Function")

_BACKENDS = {"triton": triton_probe, "reference": always_available}
_STATS = Dispatcher("vocab_parallel_token_stats", _BACKENDS)
_SURROGATE = Dispatcher("vocab_parallel_stepwise_surrogate", _BACKENDS)


def _eager(function: _Function) -> _Function:
    """The exchanges of Python objects cannot be traced."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]


@_eager
def vocab_parallel_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    banned_token: int | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> TokenStats:
    """:func:`egspo_kernels.linear_token_stats` of a head whose rows are spread over ranks.

    A collective: every rank of ``group`` calls it, with the same arguments but for its shard of
    the head, and takes the same loss of the result, which has the same bits on all of them. The
    backward pass is a collective too where ``hidden`` requires a gradient: each rank gets all of
    that of ``hidden``, and that of its own shard of ``weight`` and ``bias``. Under torch.compile
    it runs eagerly.

    Args:
        hidden: floating point [N, D], the same on every rank.
        weight: [V_r, D], rows ``vocab_start`` to ``vocab_start + V_r`` of the head, V_r > 0. The
            shards of the ranks make up the vocabulary, in any order, and need not be of one size.
        targets: integer [N] in [0, V), or None; the same on every rank. Unchecked on a GPU, one
            out of range has log-probability NaN.
        vocab_start: token id of the first row of ``weight``.
        group: the ranks among which the head is spread; None for all of them.
        bias: [V_r] or None.
        banned_token: token id in [0, V), or None.
        temperature, workspace_bytes, logits_dtype, backend: as
            :func:`egspo_kernels.linear_token_stats`; the workspace is this rank's.

    Returns:
        :class:`TokenStats` of [N] tensors; ``argmax`` is a token id of the whole vocabulary.

    Raises:
        ValueError, TypeError: on every rank: a bad argument on this rank, or (ValueError) on
            another one, arguments that differ between ranks, shards that overlap or leave a gap.
        RuntimeError: another rank failed, or did not take part within the timeout of ``group``.
    """
    with agreement(_STATS.function, group, hidden) as mine:
        operands = check_linear(hidden, weight, bias, temperature, None)
        chosen = _STATS.choose(backend, hidden.device, refuse_float64(operands[0]))
        settings = linear_settings(
            chosen,
            operands,
            temperature,
            None,
            workspace_bytes,
            logits_dtype,
            with_reference=False,
        )
        _describe(mine, operands, targets, vocab_start, settings, banned_token)
        mine.facts["backend"] = chosen
    settings = _check_tokens(mine.shard, targets, settings, banned_token)
    rows = shard_rows(*operands, targets, None, None, settings, mine.shard, chosen)
    return TokenStats(*rows[:5])


@_eager
def vocab_parallel_stepwise_surrogate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    step_ids: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    vocab_start: int,
    clip_low: float,
    clip_high: float,
    group: dist.ProcessGroup | None = None,
    beta: float = 0.0,
    kl: KL | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    banned_token: int | None = None,
    aggregation: Aggregation = "sum",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Surrogate:
    """:func:`egspo_kernels.linear_stepwise_surrogate` of a head whose rows are spread over ranks.

    A collective, forward and backward, as :func:`vocab_parallel_token_stats` explains.

    Args:
        hidden: floating point [N, D], one row per revealed token, the same on every rank.
        ref_hidden: [N, D], the same on every rank.
        ref_weight: [V_r, D], the same rows of the reference policy's head; by default ``weight``,
            which must then be frozen.
        weight, vocab_start, group, bias, banned_token, backend: as
            :func:`vocab_parallel_token_stats`.
        targets, step_ids, old_log_prob, advantage, clip_low, clip_high, beta, kl, ref_log_prob,
            weights, temperature, aggregation, workspace_bytes, logits_dtype: as
            :func:`egspo_kernels.linear_stepwise_surrogate`; the same on every rank, but for the
            workspace.

    Returns:
        :class:`Surrogate`, of the same bits on every rank; the loss is differentiable, once, in
        ``hidden`` and in the shards of ``weight`` and ``bias``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`vocab_parallel_token_stats`.
    """
    steps = Steps(step_ids, old_log_prob, advantage, weights, ref_log_prob)
    with agreement(_SURROGATE.function, group, hidden) as mine:
        objective = Objective(clip_low, clip_high, beta, kl, aggregation)
        operands = check_linear(hidden, weight, bias, temperature, None)
        check_steps(hidden.shape[0], hidden.device, *steps)
        ref_hidden, ref_weight = check_ref(operands, ref_hidden, ref_weight)
        check_reference(objective, "ref_hidden", ref_hidden, ref_log_prob)
        chosen = _SURROGATE.choose(backend, hidden.device, refuse_float64(operands[0]))
        settings = linear_settings(
            chosen,
            operands,
            temperature,
            None,
            workspace_bytes,
            logits_dtype,
            with_reference=objective.needs_exact_kl,
        )
        check_vector("targets", targets, hidden.shape[0], hidden.device)
        _describe(mine, operands, targets, vocab_start, settings, banned_token)
        mine.facts["backend"] = chosen
        mine.add_tensors(steps._asdict())
        mine.facts |= {"objective": objective, "ref_hidden": ref_hidden is not None}
    settings = _check_tokens(mine.shard, targets, settings, banned_token)
    if objective.kl == "k3" and ref_log_prob is None:
        with torch.no_grad():
            ref_operands = (ref_hidden, ref_weight, operands[2])
            ref_rows = shard_rows(*ref_operands, targets, None, None, settings, mine.shard, chosen)
        steps = steps.with_reference(ref_rows[2], objective)
    exact = (ref_hidden, ref_weight) if objective.needs_exact_kl else (None, None)
    rows = shard_rows(*operands, targets, *exact, settings, mine.shard, chosen)
    return step_objective(objective, rows[2], steps, rows[5])


def _describe(
    mine: Agreement,
    operands: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor | None,
    vocab_start: int,
    settings: Settings,
    banned_token: int | None,
) -> None:
    """Checks what is left to check on this rank alone, and tells what the others must have too."""
    hidden, weight, bias = operands
    if (
        isinstance(vocab_start, bool)
        or not isinstance(vocab_start, int)
        or not 0 <= vocab_start < 2**62
    ):
        raise ValueError(f"vocab_start must be an integer in [0, 2**62), got {vocab_start!r}")
    if targets is not None:
        check_vector("targets", targets, hidden.shape[0], hidden.device)
    mine.held = (vocab_start, weight.shape[0])
    mine.add_tensors({"targets": targets})
    mine.facts |= {
        "shape of hidden": tuple(hidden.shape),
        "dtype of the product": weight.dtype,
        "logits_dtype": settings.logits_dtype,
        "temperature": settings.temperature,
        "banned_token": banned_token,
        "bias": bias is not None,
        # The sum of its gradients is a collective: none may wait for it alone.
        "gradient of hidden": hidden.requires_grad and torch.is_grad_enabled(),
    }


def _check_tokens(
    shard: Shard, targets: Tensor | None, settings: Settings, banned_token: int | None
) -> Settings:
    """Checks against the whole vocabulary, known now; the same arguments fail on every rank.

    Returns:
        The settings, with the banned token as a row of the shard.
    """
    check_banned(banned_token, shard.vocab_size)
    if targets is not None:
        check_index("targets", targets, targets.shape[0], targets.device, shard.vocab_size)
    return settings._replace(banned_token=shard.local_token(banned_token))
