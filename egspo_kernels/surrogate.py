"""The clipped stepwise surrogate, from logits.

    rho_s = exp(log pi(U_s) - log pi_old(U_s)),  log pi(U_s) = sum of the step's token log-probs
    L_s   = -min(rho_s A_s, clip(rho_s, 1 - clip_low, 1 + clip_high) A_s) + beta KL_s
    loss  = sum_s weights_s L_s

(arXiv 2603.12554.) :func:`step_objective` is the part that works on steps; the logits and the
linear form differ only in where the per-token log-probabilities come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from egspo_kernels import reference
from egspo_kernels._backend import Dispatcher, always_available
from egspo_kernels._checks import (
    check_banned,
    check_index,
    check_matrix,
    check_temperature,
    check_vector,
)
from egspo_kernels.types import Surrogate

Aggregation = Literal["sum", "mean", "exact"]
KL = Literal["k3", "exact"]

LOG_RATIO_LIMIT = 20.0

_SURROGATE = Dispatcher("stepwise_surrogate", {"reference": always_available})


@dataclass(frozen=True)
class Objective:
    """What turns step log-probabilities into a loss. See :func:`stepwise_surrogate`."""

    clip_low: float
    clip_high: float
    beta: float
    kl: KL | None
    aggregation: Aggregation

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low must lie in [0, 1], got {self.clip_low}")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high must be >= 0, got {self.clip_high}")
        if not self.beta >= 0:
            raise ValueError(f"beta must be >= 0, got {self.beta}")
        if self.kl is not None and self.kl not in get_args(KL):
            raise ValueError(f"kl must be one of {get_args(KL)} or None, got {self.kl!r}")
        if self.beta > 0 and self.kl is None:
            raise ValueError(f"beta is {self.beta} but kl is None: name an estimator")
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(
                f"aggregation must be one of {get_args(Aggregation)}, got {self.aggregation!r}"
            )

    @property
    def needs_exact_kl(self) -> bool:
        return self.kl == "exact"


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
        backend: ``"auto"`` or a backend name.

    Returns:
        :class:`Surrogate`.

    Raises:
        ValueError, TypeError: on a bad argument, named in the message.
        UnavailableBackendError: if an explicit backend cannot run.
    """
    objective = Objective(clip_low, clip_high, beta, kl, aggregation)
    check_matrix("logits", logits)
    check_temperature(temperature)
    check_banned(banned_token, logits.shape[1])
    check_index("targets", targets, logits.shape[0], logits.device, logits.shape[1])
    check_steps(
        logits.shape[0], logits.device, step_ids, old_log_prob, advantage, weights, ref_log_prob
    )
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise ValueError(
            f"ref_logits must have the shape of logits, {tuple(logits.shape)}, "
            f"got {tuple(ref_logits.shape)}"
        )
    check_reference(objective, "ref_logits", ref_logits, ref_log_prob)
    _SURROGATE.choose(backend, logits.device)

    log_probs = reference.log_softmax(reference.tempered(logits, temperature, banned_token))
    token_log_prob = reference.gather_last(log_probs, targets)
    token_kl = None
    if ref_logits is not None:
        with torch.no_grad():
            ref_scores = reference.tempered(ref_logits, temperature, banned_token)
            ref_log_probs = reference.log_softmax(ref_scores)
        if objective.needs_exact_kl:
            token_kl = _row_kl(log_probs, ref_log_probs)
        elif ref_log_prob is None:
            per_token = reference.gather_last(ref_log_probs, targets)
            ref_log_prob = aggregate_steps(per_token, step_ids, old_log_prob.shape[0], aggregation)
    return step_objective(
        objective,
        token_log_prob,
        step_ids,
        old_log_prob,
        advantage,
        weights,
        ref_log_prob,
        token_kl,
    )


def aggregate_steps(
    token_values: Tensor, step_ids: Tensor, num_steps: int, aggregation: Aggregation
) -> Tensor:
    """Sum ([N] tokens to [S] steps), or mean for ``aggregation="mean"``. Empty steps give 0."""
    totals = token_values.new_zeros(num_steps).index_add(0, step_ids.long(), token_values)
    if aggregation == "mean":
        return totals / tokens_per_step(step_ids, num_steps).to(totals.dtype)
    return totals


def tokens_per_step(step_ids: Tensor, num_steps: int) -> Tensor:
    """int64 [S]: tokens in each step, at least 1 so that it can divide."""
    ones = torch.ones_like(step_ids, dtype=torch.int64)
    counts = torch.zeros(num_steps, dtype=torch.int64, device=step_ids.device)
    return counts.index_add(0, step_ids.long(), ones).clamp_(min=1)


def step_objective(
    objective: Objective,
    token_log_prob: Tensor,
    step_ids: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    weights: Tensor | None,
    ref_log_prob: Tensor | None,
    token_kl: Tensor | None,
) -> Surrogate:
    """Token log-probabilities [N] to the surrogate; the other arguments as the public functions."""
    num_steps, dtype = old_log_prob.shape[0], token_log_prob.dtype
    aggregation = objective.aggregation
    log_prob = aggregate_steps(token_log_prob, step_ids, num_steps, aggregation)
    advantage = advantage.to(dtype)
    if weights is None:
        weights = log_prob.new_full((num_steps,), 1.0 / max(num_steps, 1))

    ratio, clamped = _clamped_exp(log_prob - old_log_prob.to(dtype))
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)

    kl = torch.zeros_like(log_prob)
    if objective.kl == "k3":
        assert ref_log_prob is not None
        difference = ref_log_prob.to(dtype) - log_prob
        ref_ratio, ref_clamped = _clamped_exp(difference)
        kl = ref_ratio - difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) - 1
        clamped = clamped + ref_clamped
    elif objective.kl == "exact":
        assert token_kl is not None
        kl = aggregate_steps(token_kl, step_ids, num_steps, aggregation)
    if objective.beta > 0:
        loss = loss + objective.beta * kl
    if aggregation == "sum":
        loss = loss / tokens_per_step(step_ids, num_steps).to(dtype)

    return Surrogate(
        loss=(weights.to(dtype) * loss).sum(),
        log_prob=log_prob.detach(),
        ratio=ratio.detach(),
        kl=kl.detach(),
        clipped_low=(ratio.detach() < 1 - objective.clip_low) & (advantage < 0),
        clipped_high=(ratio.detach() > 1 + objective.clip_high) & (advantage > 0),
        clamped=clamped,
    )


def _clamped_exp(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """``exp`` of the log-ratio clamped to +-20, and how many were clamped (int64 scalar)."""
    clamped = (log_ratio.detach().abs() > LOG_RATIO_LIMIT).sum()
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(), clamped


def _row_kl(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """``sum_v p (log p - log p_ref)`` per row; tokens of probability 0 contribute 0."""
    difference = (log_probs - ref_log_probs).masked_fill(log_probs == float("-inf"), 0.0)
    return (log_probs.exp() * difference).sum(-1)


def check_steps(
    rows: int,
    device: torch.device,
    step_ids: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    weights: Tensor | None,
    ref_log_prob: Tensor | None,
) -> None:
    """Shapes, dtypes and devices of the per-step arguments."""
    if not isinstance(old_log_prob, Tensor) or old_log_prob.ndim != 1:
        raise ValueError("old_log_prob must be a vector with one value per step")
    num_steps = old_log_prob.shape[0]
    check_index("step_ids", step_ids, rows, device, num_steps)
    named = {
        "old_log_prob": old_log_prob,
        "advantage": advantage,
        "weights": weights,
        "ref_log_prob": ref_log_prob,
    }
    for name, tensor in named.items():
        if tensor is None:
            continue
        check_vector(name, tensor, num_steps, device)
        if tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient: only the policy is trained")


def check_reference(
    objective: Objective, rows_name: str, ref_rows: Tensor | None, ref_log_prob: Tensor | None
) -> None:
    """The reference policy must be given in the form that ``kl`` needs."""
    if objective.needs_exact_kl and ref_rows is None:
        raise ValueError(f"kl='exact' needs {rows_name}")
    if objective.kl == "k3" and ref_rows is None and ref_log_prob is None:
        raise ValueError(f"kl='k3' needs ref_log_prob or {rows_name}")
    if objective.kl is None and (ref_rows is not None or ref_log_prob is not None):
        raise ValueError("a reference policy was given but kl is None")
