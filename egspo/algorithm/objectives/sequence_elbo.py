"""ELBO-based sequence-level policy optimization: ESPO (arXiv 2512.03759)."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo.algorithm.objectives.remasked import (
    Bundle,
    Masks,
    Outcome,
    RemaskedObjective,
    clipped_gain,
    log_ratio,
    smallest,
)


class SequenceElboObjective(RemaskedObjective):
    """The whole completion is one action, and the ELBO stands for its log-likelihood:

        ELBO(y) = E_{l uniform in 1..n} E_{l of n tokens masked} [(n / l) sum over masked of log p]

    It is estimated from ``mask_samples`` complementary pairs of masks (coupled variance reduction):
    l is uniform in 0..n, the first masks l tokens, the second the other n - l, and the estimate is
    ``[(n + 1) / l S_first + (n + 1) / (n - l) S_second] / 2`` with the sums S of log-probabilities
    of what is masked, 0 where nothing is: unbiased, and every token is scored. With the ratio of a
    token's size ``rho_i = exp((ELBO_i - ELBO_old,i) / n_i)`` the loss is the mean over completions
    of

        - min(rho_i A_i, clip(rho_i) A_i) + beta (ELBO_i - ELBO_ref,i)^2 / (2 n_i)

    the latter the KL estimate k2. ``A_i = R_i - mean_j R_j``; the authors' leave-one-out baseline
    is the same up to a factor G / (G - 1). n counts the tokens up to the first EOS, where their
    code counts the whole canvas. Preset ``espo``: clip 0.2, beta 0.01, 2 pairs, 8 updates.
    """

    @property
    def canvases(self) -> int:
        return 2 * self.config.algorithm.mask_samples

    def masks(self, prompts: Tensor, tokens: Tensor, ids: Tensor, update: int) -> Masks:
        length = tokens.sum(1)
        scored = []
        for pair in range(self.config.algorithm.mask_samples):
            share = self.uniform(ids, update, 2 * pair, 1)[:, 0].double()
            count = (share * (length + 1)).long().minimum(length)
            noise = self.uniform(ids, update, 2 * pair + 1, tokens.shape[1])
            first = smallest(noise, tokens, count)
            scored += [first, tokens & ~first]
        stacked = torch.stack(scored, dim=1)
        weight = (length + 1)[:, None] / stacked.sum(2).double().clamp(min=1) / self.canvases
        prompt = torch.zeros_like(prompts)[:, None].expand(-1, self.canvases, -1)
        return Masks(prompt, stacked | ~tokens[:, None], stacked, weight)

    def outcome(self, bundle: Bundle) -> Outcome:
        algorithm, length = self.config.algorithm, bundle.tokens.sum(1)
        elbo = bundle.estimate(bundle.log_prob).sum(1)
        old = bundle.estimate(bundle.old).sum(1)
        difference, clamped = log_ratio(elbo / length, old / length)
        ratio = difference.exp()
        loss, kl = -clipped_gain(ratio, bundle.advantage, algorithm), torch.zeros_like(ratio)
        if bundle.reference is not None:
            apart = elbo - bundle.estimate(bundle.reference).sum(1)
            kl = apart.square() / (2 * length)
            loss = loss + algorithm.beta * kl
        return Outcome(loss.sum(), ratio, kl, bundle.advantage, clamped)
