"""Sandwiched policy gradient: SPG (arXiv 2510.09541, section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from egspo.algorithm.objectives.remasked import (
    Bundle,
    Masks,
    Outcome,
    RemaskedObjective,
    ratio_free,
    smallest,
)


class SandwichObjective(RemaskedObjective):
    """A lower bound of the log-likelihood is raised where the advantage is positive, and an upper
    one lowered where it is negative, both by the token. Of M canvases (``mask_samples``), with m_s
    the set that canvas s masks of n tokens and t_s = |m_s| / n,

        lower = mean_s [sum_{k in m_s} log p_sk / |m_s|]
        upper = mean_k [log((1 / M) sum_{s: k in m_s} p_sk^beta / t_s)] / beta

    (the ELBO, and the EUBO up to a constant, k over the tokens that any canvas masks; beta is
    ``bound_power``). The loss is ``- sum_i A_i n_i L_i / sum_i n_i`` with ``L`` the lower bound for
    A >= 0, else ``omega upper + (1 - omega) lower`` (``bound_share``). No ratios, clips or KL.

    Masks are block-wise, as the rollout decodes: of a block drawn uniformly among those of the
    completion, 1 to all of its tokens are masked, all blocks behind it as a whole, and tokens of
    the prompt and the blocks before it with probability ``prompt_masking``. Everything masked is
    scored, as in the authors' code. Blocks are drawn with replacement, where they are not there.
    Preset ``spg``: M = 2, beta 1.5 (the authors take 1 for Sudoku), omega 0.5, 4 updates.
    """

    has_ratios = False

    @property
    def canvases(self) -> int:
        return self.config.algorithm.mask_samples

    def masks(self, prompts: Tensor, tokens: Tensor, ids: Tensor, update: int) -> Masks:
        width = self.config.generation.block_length
        length = tokens.sum(1)
        blocks = -(-length // width)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        prompt, hidden = [], []
        for sample in range(self.canvases):
            block_at, share = self.uniform(ids, update, 4 * sample, 2).double().unbind(1)
            begin = (block_at * blocks).long().minimum(blocks - 1) * width
            of_block = (length - begin).clamp(max=width)
            count = 1 + (share * of_block).long().minimum(of_block - 1)
            inside = tokens & (position >= begin[:, None]) & (position < begin[:, None] + width)
            noise = self.uniform(ids, update, 4 * sample + 1, tokens.shape[1])
            early = self.uniform(ids, update, 4 * sample + 2, tokens.shape[1])
            before = (position < begin[:, None]) & (early < self.config.algorithm.prompt_masking)
            behind = position >= begin[:, None] + width
            hidden.append(smallest(noise, inside, count) | before | behind | ~tokens)
            prompt.append(self.prompt_masks(prompts, ids, update, 4 * sample + 3))
        stacked = torch.stack(hidden, dim=1)
        scored = stacked & tokens[:, None]
        weight = 1 / scored.sum(2).double() / self.canvases
        return Masks(torch.stack(prompt, dim=1), stacked, scored, weight)

    def outcome(self, bundle: Bundle) -> Outcome:
        algorithm, length = self.config.algorithm, bundle.tokens.sum(1)
        lower = bundle.estimate(bundle.log_prob).sum(1)
        share = bundle.scored.sum(2, keepdim=True).double() / length[:, None, None]
        power = algorithm.bound_power
        # In logarithms, so that no power of a small probability is lost.
        terms = (power * bundle.log_prob - share.log()).masked_fill(~bundle.scored, -math.inf)
        ever = bundle.scored.any(1)
        terms = terms.masked_fill(~ever[:, None], 0.0)  # no gradient of a sum over nothing
        mean = terms.logsumexp(1) - math.log(self.canvases)
        upper = mean.masked_fill(~ever, 0.0).sum(1) / ever.sum(1) / power
        mixed = algorithm.bound_share * upper + (1 - algorithm.bound_share) * lower
        likelihood = lower.where(bundle.advantage >= 0, mixed)
        return ratio_free(-(bundle.advantage * length * likelihood).sum() / bundle.mean_tokens)
