"""The stepwise surrogate from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo_kernels.reference.softmax import gather_last, kl_of, log_softmax, tempered
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
) -> Surrogate:
    """As :func:`egspo_kernels.stepwise_surrogate`, of checked arguments."""
    log_probs = log_softmax(tempered(logits, temperature, banned_token))
    token_log_prob = gather_last(log_probs, targets)
    token_kl = None
    if ref_logits is not None:
        with torch.no_grad():
            ref_scores = tempered(ref_logits, temperature, banned_token)
            ref_log_probs = log_softmax(ref_scores)
        if objective.needs_exact_kl:
            token_kl = kl_of(log_probs, ref_log_probs)
        elif steps.ref_log_prob is None:
            per_token = gather_last(ref_log_probs, targets)
            steps = steps.with_reference(per_token, objective)
    return step_objective(objective, token_log_prob, steps, token_kl)
