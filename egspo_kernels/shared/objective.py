"""The objective of a step: what turns step log-probabilities into a loss, for every backend.

    rho_s = exp(log pi(U_s) - log pi_old(U_s)),  log pi(U_s) = sum of the step's token log-probs
    L_s   = -min(rho_s A_s, clip(rho_s, 1 - clip_low, 1 + clip_high) A_s) + beta KL_s
    loss  = sum_s weights_s L_s

(arXiv 2603.12554.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from egspo_kernels.checks.arguments import check_index, check_number, check_vector
from egspo_kernels.types import Surrogate

Aggregation = Literal["sum", "mean", "exact"]
KL = Literal["k3", "exact"]
_AGGREGATIONS, _KLS = get_args(Aggregation), get_args(KL)

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Objective:
    """Turns step log-probabilities into a loss; see :func:`egspo_kernels.stepwise_surrogate`."""

    clip_low: float
    clip_high: float
    beta: float
    kl: KL | None
    aggregation: Aggregation

    def __post_init__(self) -> None:
        check_number("clip_low", self.clip_low)
        check_number("clip_high", self.clip_high)
        check_number("beta", self.beta)
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low must lie in [0, 1], got {self.clip_low}")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high must be >= 0, got {self.clip_high}")
        if not self.beta >= 0:
            raise ValueError(f"beta must be >= 0, got {self.beta}")
        if self.kl is not None and self.kl not in _KLS:
            raise ValueError(f"kl must be one of {_KLS} or None, got {self.kl!r}")
        if self.beta > 0 and self.kl is None:
            raise ValueError(f"beta is {self.beta} but kl is None: name an estimator")
        if self.aggregation not in _AGGREGATIONS:
            raise ValueError(
                f"aggregation must be one of {_AGGREGATIONS}, got {self.aggregation!r}"
            )

    @property
    def needs_exact_kl(self) -> bool:
        return self.kl == "exact"

    def reads_reference_rows(self, steps: Steps) -> bool:
        """Whether the reference policy's logits are needed, and not only its log-probabilities."""
        return self.kl == "exact" or (self.kl == "k3" and steps.ref_log_prob is None)

    def values(self) -> tuple[float, float, float, KL | None, Aggregation]:
        """The fields, in the types that an operator takes."""
        numbers = float(self.clip_low), float(self.clip_high), float(self.beta)
        return *numbers, self.kl, self.aggregation


class Steps(NamedTuple):
    """The per-step arguments of the public functions, as they explain them."""

    step_ids: Tensor
    """[N]; the others are [S]."""
    old_log_prob: Tensor
    advantage: Tensor
    weights: Tensor | None
    ref_log_prob: Tensor | None

    def with_reference(self, token_log_prob: Tensor, objective: Objective) -> Steps:
        """These steps with ``ref_log_prob`` made from the reference policy's tokens [N]."""
        totals = aggregate_steps(
            token_log_prob, self.step_ids, self.old_log_prob.shape[0], objective.aggregation
        )
        return self._replace(ref_log_prob=totals)


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
    objective: Objective, token_log_prob: Tensor, steps: Steps, token_kl: Tensor | None
) -> Surrogate:
    """Token log-probabilities [N], and KL [N] for ``kl="exact"``, to the surrogate."""
    step_ids, old_log_prob, advantage, weights, ref_log_prob = steps
    num_steps, dtype = old_log_prob.shape[0], token_log_prob.dtype
    aggregation = objective.aggregation
    log_prob = aggregate_steps(token_log_prob, step_ids, num_steps, aggregation)
    advantage = advantage.to(dtype)

    ratio, clamped = _clamped_exp(log_prob - old_log_prob.to(dtype))
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)

    if objective.kl == "k3":
        assert ref_log_prob is not None
        difference = ref_log_prob.to(dtype) - log_prob
        ref_ratio, ref_clamped = _clamped_exp(difference)
        kl = ref_ratio - difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) - 1
        clamped = clamped + ref_clamped
    elif objective.kl == "exact":
        assert token_kl is not None
        kl = aggregate_steps(token_kl, step_ids, num_steps, aggregation)
    else:
        kl = torch.zeros_like(log_prob)
    if objective.beta > 0:
        loss = loss + objective.beta * kl
    if aggregation == "sum":
        loss = loss / tokens_per_step(step_ids, num_steps).to(dtype)

    weighted = loss * (1.0 / max(num_steps, 1)) if weights is None else weights.to(dtype) * loss
    measured = ratio.detach()
    return Surrogate(
        loss=weighted.sum(),
        log_prob=log_prob.detach(),
        ratio=measured,
        kl=kl.detach(),
        clipped_low=(measured < 1 - objective.clip_low) & (advantage < 0),
        clipped_high=(measured > 1 + objective.clip_high) & (advantage > 0),
        clamped=clamped,
    )


def _clamped_exp(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """``exp`` of the log-ratio clamped to +-20, and how many were clamped (int64 scalar)."""
    clamped = (log_ratio.detach().abs() > LOG_RATIO_LIMIT).sum()
    limited = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # The gradient of a clamp is 0 at NaN: a loss of NaN would look as if it had a gradient.
    return torch.where(log_ratio.isnan(), log_ratio, limited).exp(), clamped


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
    _check_step_values("old_log_prob", old_log_prob, num_steps, device)
    _check_step_values("advantage", advantage, num_steps, device)
    if weights is not None:
        _check_step_values("weights", weights, num_steps, device)
    if ref_log_prob is not None:
        _check_step_values("ref_log_prob", ref_log_prob, num_steps, device)


def _check_step_values(name: str, tensor: Tensor, num_steps: int, device: torch.device) -> None:
    check_vector(name, tensor, num_steps, device)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
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
