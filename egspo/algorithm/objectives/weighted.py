"""Weighted log-likelihood without ratios: wd1 (arXiv 2507.08838)."""

from __future__ import annotations

import math

from torch import Tensor

from egspo.algorithm.objectives.remasked import (
    Bundle,
    Masks,
    Outcome,
    RemaskedObjective,
    one_canvas,
    ratio_free,
)


class WeightedObjective(RemaskedObjective):
    """With the advantages ``A_i = R_i - mean_j R_j`` of a group, ``w+ = softmax(psi A)`` and ``w- =
    softmax(-psi A)`` over its members, wd1's objective with negative samples is

        sum_i (w-_i - w+_i) log p(o_i)

    of a group, here in the mean over groups. ``log p`` is d1's mean field: the sum over the tokens
    of the completion, from one pass, with prompt tokens masked. Neither old nor reference
    probabilities are needed; regularization to a reference policy is not here. Members without a
    reward have no weight. Preset ``wd1``: psi (``weight_scale``) 1, 8 updates.
    """

    canvases = 1
    has_ratios = False

    def masks(self, prompts: Tensor, tokens: Tensor, ids: Tensor, update: int) -> Masks:
        return one_canvas(self.prompt_masks(prompts, ids, update, 0), tokens)

    def completion_advantages(self, rewards: Tensor) -> Tensor:
        """``G (w+ - w-)``: G times the weight, as a mean over completions is taken."""
        scaled = self.config.algorithm.weight_scale * super().completion_advantages(rewards)
        missing = rewards.isnan()
        positive, negative = (
            (sign * scaled).masked_fill(missing, -math.inf).softmax(1) for sign in (1, -1)
        )
        # A group without any reward has no weights at all.
        return (rewards.shape[1] * (positive - negative)).nan_to_num(nan=0.0)

    def outcome(self, bundle: Bundle) -> Outcome:
        log_prob = bundle.estimate(bundle.log_prob).sum(1)
        return ratio_free(-(bundle.advantage * log_prob).sum())
