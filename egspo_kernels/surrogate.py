"""The clipped stepwise surrogate (arXiv 2603.12554) from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo_kernels import reference
from egspo_kernels.checks.arguments import (
    check_banned,
    check_index,
    check_matrix,
    check_temperature,
    refuse_float64,
    refuse_tracing,
)
from egspo_kernels.cpp_kernels import surrogate as cpp_surrogate
from egspo_kernels.dispatch.backend import Dispatcher, always_available, cpp_probe, triton_probe
from egspo_kernels.shared.objective import (
    KL,
    Aggregation,
    Objective,
    Steps,
    aggregate_steps,
    check_reference,
    check_steps,
)
from egspo_kernels.types import Surrogate

__all__ = ["aggregate_steps", "stepwise_surrogate"]

_SURROGATE = Dispatcher(
    "stepwise_surrogate",
    {"triton": triton_probe, "cpp": cpp_probe, "reference": always_available},
)


def stepwise_surrogate(
    logits: Tensor,
    targets: Tensor,
    step_ids: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    beta: float = 0.0,
    kl: KL | None = None,
    ref_logits: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    banned_token: int | None = None,
    aggregation: Aggregation = "sum",
    overwrite_logits: bool = False,
    backend: str = "auto",
) -> Surrogate:
    """Clipped stepwise surrogate loss over S denoising steps that revealed N tokens in all.

    Args:
        logits: floating point [N, V], one row per revealed token; the loss is differentiable in it.
        targets: integer [N], the token revealed at each row.
        step_ids: integer [N] in [0, S), the step each row belongs to; any order.
        old_log_prob: [S] log-probability of each step under the behaviour policy, aggregated as
            ``aggregation`` says.
        advantage: [S].
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        beta: weight of the KL term.
        kl: ``"k3"`` (estimate from the step's log-ratio), ``"exact"`` (over the vocabulary), None.
        ref_logits: [N, V] logits of the reference policy; needed by ``kl="exact"``, and by
            ``kl="k3"`` unless ``ref_log_prob`` is given.
        ref_log_prob: [S] log-probability of each step under the reference policy.
        weights: [S] weight of each step in the loss; 1 / S by default.
        temperature: of the softmax, for policy and reference alike.
        banned_token: token id left out of the normaliser.
        aggregation: ``"sum"``: summed log-ratio, loss divided by the tokens of the step (the
            authors' choice); ``"mean"``: mean log-ratio; ``"exact"``: summed log-ratio, no
            division, which alone gives the unbiased policy gradient when steps differ in size.
        overwrite_logits: the backward pass writes the gradient into the memory of ``logits``,
            half the memory for logits of a head that nothing else needs. Not with the
            reference, and refused where ``logits`` is a leaf, has overlapping or scattered rows,
            or shares its memory with ``ref_logits``. Whatever else saved ``logits`` for its own
            backward pass raises there, as after any in-place operation; so does a second one.
        backend: ``"auto"`` or a backend name.

    Returns:
        :class:`Surrogate`. The loss is differentiable; only once but with the reference.

    Raises:
        ValueError, TypeError: on a bad argument, named in the message.
        UnavailableBackendError: if an explicit backend cannot run.
    """
    objective = Objective(clip_low, clip_high, beta, kl, aggregation)
    _check_logits(logits, ref_logits, temperature, banned_token)
    check_index("targets", targets, logits.shape[0], logits.device, logits.shape[1])
    check_steps(
        logits.shape[0], logits.device, step_ids, old_log_prob, advantage, weights, ref_log_prob
    )
    check_reference(objective, "ref_logits", ref_logits, ref_log_prob)
    steps = Steps(step_ids, old_log_prob, advantage, weights, ref_log_prob)
    refused = refuse_float64(logits, ref_logits) | refuse_tracing()
    chosen = _choose(backend, logits.device, refused)
    if overwrite_logits:
        _check_overwrite(chosen, logits, ref_logits)
    arguments = (logits, targets, steps, ref_logits, objective, temperature, banned_token)
    if chosen == "triton":
        from egspo_kernels.triton_kernels import surrogate

        return surrogate.stepwise_surrogate(*arguments, overwrite_logits)
    if chosen == "cpp":
        return cpp_surrogate.stepwise_surrogate(*arguments, overwrite_logits)
    return reference.stepwise_surrogate(*arguments)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(backend: str, device: torch.device, refused: dict[str, str]) -> str:
    """Under torch.compile the choice is made once, when the call is traced."""
    return _SURROGATE.choose(backend, device, refused)


def _check_logits(
    logits: Tensor, ref_logits: Tensor | None, temperature: float, banned_token: int | None
) -> None:
    check_matrix("logits", logits)
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have at least one column, got shape {tuple(logits.shape)}")
    check_temperature(temperature)
    check_banned(banned_token, logits.shape[1])
    if ref_logits is None:
        return
    check_matrix("ref_logits", ref_logits)
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"ref_logits must have the shape of logits, {tuple(logits.shape)}, "
            f"got {tuple(ref_logits.shape)}"
        )
    if ref_logits.device != logits.device:
        raise ValueError(f"ref_logits is on {ref_logits.device}, logits on {logits.device}")


def _check_overwrite(backend: str, logits: Tensor, ref_logits: Tensor | None) -> None:
    """The cases where a gradient in the memory of the logits would be ignored or wrong."""
    if torch.compiler.is_compiling():
        raise ValueError("overwrite_logits is for eager mode: torch.compile plans memory itself")
    if backend == "reference":
        raise ValueError("overwrite_logits needs a compiled backend, this call runs 'reference'")
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "overwrite_logits: logits is a leaf, and its gradient would replace its value"
        )
    rows, columns = logits.shape
    consecutive = columns == 1 or logits.stride(1) == 1
    if not consecutive or (rows > 1 and logits.stride(0) < columns):
        raise ValueError(
            "overwrite_logits: logits must have consecutive columns and rows that do not overlap, "
            f"got strides {logits.stride()} for shape {(rows, columns)}"
        )
    if ref_logits is not None and (
        ref_logits.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    ):
        raise ValueError("overwrite_logits: ref_logits shares the memory of logits")
