"""Coupled-GRPO of DiffuCoder (arXiv 2506.20639)."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo.algorithm.objectives.remasked import (
    Bundle,
    Masks,
    Outcome,
    RemaskedObjective,
    token_outcome,
)

LEAST, MOST = 0.2, 0.8
"""Range of the share t that is masked, as in the authors' code."""


class CoupledObjective(RemaskedObjective):
    """Three canvases: the completion masked as a whole, and a pair of complementary masks, the
    first of every token with probability t, uniform in [0.2, 0.8]. What stands for the
    log-probability of a token that the first of the pair masks, or the second, is

        (log p_whole + log p_first / t) / 2     or     (log p_whole + log p_second / (1 - t)) / 2

    (lambda = 1 of the paper), so that every token is scored twice. On it GRPO on tokens, as
    :func:`~egspo.algorithm.objectives.remasked.token_outcome`; prompts are not masked. t is drawn
    for every completion, where the authors' code draws it once for a batch, and their leave-one-out
    baseline is the same up to a factor G / (G - 1). Preset ``coupled-grpo``: clip 0.5, beta 0.01, 2
    updates.
    """

    canvases = 3

    def masks(self, prompts: Tensor, tokens: Tensor, ids: Tensor, update: int) -> Masks:
        share = LEAST + (MOST - LEAST) * self.uniform(ids, update, 0, 1).double()
        first = self.uniform(ids, update, 1, tokens.shape[1]) < share
        scored = torch.stack([tokens, tokens & first, tokens & ~first], dim=1)
        weight = torch.cat([torch.ones_like(share), 1 / share, 1 / (1 - share)], dim=1) / 2
        prompt = torch.zeros_like(prompts)[:, None].expand(-1, self.canvases, -1)
        return Masks(prompt, scored | ~tokens[:, None], scored, weight)

    def outcome(self, bundle: Bundle) -> Outcome:
        return token_outcome(bundle, self.config.algorithm)
