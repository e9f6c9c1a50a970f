"""One-step mean-field GRPO: diffu-GRPO of d1 (arXiv 2504.12216)."""

from __future__ import annotations

from torch import Tensor

from egspo.algorithm.objectives.remasked import (
    Bundle,
    Masks,
    Outcome,
    RemaskedObjective,
    one_canvas,
    token_outcome,
)


class MeanFieldObjective(RemaskedObjective):
    """The likelihood of a completion is a product over its tokens, each with the probability that
    *one* pass gives it, the completion masked as a whole and the prompt with probability
    ``prompt_masking`` (0.15). With ``r = exp(log p - log p_old)`` of a token and ``A_i = R_i -
    mean_j R_j`` of its completion, the loss is

        - sum_i sum_k [min(r_ik A_i, clip(r_ik) A_i) - beta KL_ik] / (tokens of the training step)

    with the KL estimate k3 of every token. As in d1's code the mean is over all tokens, where its
    paper first takes the mean of each completion. Preset ``d1``: clip 0.5, beta 0.04, 12 updates.
    """

    canvases = 1

    def masks(self, prompts: Tensor, tokens: Tensor, ids: Tensor, update: int) -> Masks:
        return one_canvas(self.prompt_masks(prompts, ids, update, 0), tokens)

    def outcome(self, bundle: Bundle) -> Outcome:
        return token_outcome(bundle, self.config.algorithm)
