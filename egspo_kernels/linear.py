"""Statistics and surrogate straight from hidden states, within a stated workspace.

Logits are made a chunk of rows at a time and made again in the backward pass, so that the memory
they take depends on ``workspace_bytes`` and not on the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egspo_kernels.checks.arguments import check_index, refuse_float64, refuse_tracing
from egspo_kernels.checks.linear import check_linear, check_ref
from egspo_kernels.cpp_kernels import linear as cpp_linear
from egspo_kernels.dispatch.backend import Dispatcher, always_available, cpp_probe, triton_probe
from egspo_kernels.reference import linear as reference_linear
from egspo_kernels.shared.objective import (
    KL,
    Aggregation,
    Objective,
    Steps,
    check_reference,
    check_steps,
    step_objective,
)
from egspo_kernels.types import Surrogate, TokenStats
from egspo_kernels.workspace import DEFAULT_WORKSPACE_BYTES, linear_settings

_BACKENDS = {"triton": triton_probe, "cpp": cpp_probe, "reference": always_available}
_LINEAR_STATS = Dispatcher("linear_token_stats", _BACKENDS)
_LINEAR_SURROGATE = Dispatcher("linear_stepwise_surrogate", _BACKENDS)
_ROWS = {"cpp": cpp_linear.linear_rows, "reference": reference_linear.linear_rows}


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    banned_token: int | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> TokenStats:
    """:func:`egspo_kernels.token_stats` of ``hidden @ weight.T + bias``, never held whole.

    ``logsumexp``, ``entropy`` and ``log_prob`` are differentiable, once, in ``hidden``, ``weight``
    and ``bias`` (computed only for those that require a gradient). Under autocast the product is
    taken in the autocast dtype, in the backward pass too.

    Args:
        hidden: floating point [N, D].
        weight: [V, D], the dtype of ``hidden`` outside autocast.
        targets: integer [N] in [0, V), or None.
        bias: [V] or None.
        temperature, banned_token, backend: as :func:`egspo_kernels.token_stats`.
        workspace_bytes: bound on the vocabulary-sized temporaries alive at once. For a row of
            bfloat16 logits, triton and cpp take 2 bytes per vocabulary entry and the reference 24.
            The gradient of ``weight`` comes on top: it and one product of its size. With cpp rows
            that all fit keep their logits until the backward pass; otherwise they are made again.
        logits_dtype: dtype of the product, by default that of its operands. ``torch.float32``
            keeps the digits that bfloat16 logits lose, on a GPU.

    Returns:
        :class:`TokenStats` of [N] tensors.

    Raises:
        ValueError: also when the workspace cannot hold one row.
    """
    hidden, weight, bias = check_linear(hidden, weight, bias, temperature, banned_token)
    if targets is not None:
        check_index("targets", targets, hidden.shape[0], hidden.device, weight.shape[0])
    chosen = _choose(False, backend, hidden.device, refuse_float64(hidden) | refuse_tracing())
    settings = linear_settings(
        chosen,
        (hidden, weight, bias),
        temperature,
        banned_token,
        workspace_bytes,
        logits_dtype,
        with_reference=False,
    )
    if chosen == "triton":
        from egspo_kernels.triton_kernels import linear

        head = linear.Head(hidden, weight, bias)
        return TokenStats(*linear.linear_token_stats(head, targets, settings))
    linear_rows = _ROWS[chosen]
    outputs = linear_rows(hidden, weight, bias, targets, None, None, settings)
    return TokenStats(*outputs[:5])


def linear_stepwise_surrogate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    step_ids: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
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
    """:func:`egspo_kernels.stepwise_surrogate` of ``hidden @ weight.T + bias``, never held whole.

    Args:
        hidden: floating point [N, D], one row per revealed token.
        weight: [V, D].
        ref_hidden: [N, D] hidden states of the reference policy; needed by ``kl="exact"``, and by
            ``kl="k3"`` unless ``ref_log_prob`` is given.
        ref_weight: [V, D] head of the reference policy; by default ``weight``, which must then be
            frozen. ``bias`` is shared, and must be frozen where a reference is used.
        workspace_bytes, logits_dtype: as :func:`linear_token_stats`; the exact KL needs a second
            row of logits.
        targets, step_ids, old_log_prob, advantage, clip_low, clip_high, beta, kl, ref_log_prob,
            weights, temperature, banned_token, aggregation, backend: as
            :func:`egspo_kernels.stepwise_surrogate`.

    Returns:
        :class:`Surrogate`; the loss is differentiable, once, in ``hidden``, ``weight``, ``bias``.
    """
    objective = Objective(clip_low, clip_high, beta, kl, aggregation)
    hidden, weight, bias = check_linear(hidden, weight, bias, temperature, banned_token)
    rows, vocab_size = hidden.shape[0], weight.shape[0]
    check_index("targets", targets, rows, hidden.device, vocab_size)
    check_steps(rows, hidden.device, step_ids, old_log_prob, advantage, weights, ref_log_prob)
    ref_hidden, ref_weight = check_ref((hidden, weight, bias), ref_hidden, ref_weight)
    check_reference(objective, "ref_hidden", ref_hidden, ref_log_prob)
    steps = Steps(step_ids, old_log_prob, advantage, weights, ref_log_prob)
    chosen = _choose(True, backend, hidden.device, refuse_float64(hidden) | refuse_tracing())
    settings = linear_settings(
        chosen,
        (hidden, weight, bias),
        temperature,
        banned_token,
        workspace_bytes,
        logits_dtype,
        with_reference=objective.needs_exact_kl,
    )
    if chosen == "triton":
        from egspo_kernels.triton_kernels import linear, linear_surrogate

        head = linear.Head(hidden, weight, bias)
        return linear_surrogate.linear_stepwise_surrogate(
            head, targets, steps, ref_hidden, ref_weight, objective, settings
        )
    linear_rows = _ROWS[chosen]
    if objective.kl == "k3" and ref_log_prob is None:
        assert ref_hidden is not None
        with torch.no_grad():
            ref_rows = linear_rows(ref_hidden, ref_weight, bias, targets, None, None, settings)
        steps = steps.with_reference(ref_rows[2], objective)
    exact_rows = ref_hidden if objective.needs_exact_kl else None
    _, _, log_prob, _, _, token_kl = linear_rows(
        hidden, weight, bias, targets, exact_rows, ref_weight, settings
    )
    return step_objective(objective, log_prob, steps, token_kl)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(surrogate: bool, backend: str, device: torch.device, refused: dict[str, str]) -> str:
    """Under torch.compile the choice is made once, when the call is traced."""
    dispatcher = _LINEAR_SURROGATE if surrogate else _LINEAR_STATS
    return dispatcher.choose(backend, device, refused)
