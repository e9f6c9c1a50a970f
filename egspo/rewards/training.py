"""Rewards of completions of the training prompts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from egspo.config import TaskConfig
from egspo.models.tokenization import decode_completions
from egspo.rewards.scoring import ScoredRewards, score_completions
from egspo.tasks import Reward
from egspo.tasks.prompts import Data

logger = logging.getLogger("egspo")


class TrainingRewards:
    """The task's reward functions on training prompts, which are named by their places."""

    def __init__(self, config: TaskConfig, data: Data, eos_id: int) -> None:
        self.config, self.data, self.eos_id = config, data, eos_id
        self._one_at_a_time = threading.Lock()

    @property
    def intermediate(self) -> list[Reward]:
        """The functions that score one-step completions."""
        return [reward for reward in self.data.task.rewards if reward.intermediate]

    def decode(self, tokens: Tensor) -> list[str]:
        """Texts of completions int64 [N, L]."""
        return decode_completions(self.data.tokenizer, tokens.tolist(), self.eos_id)

    def score(
        self, rewards: Sequence[Reward], texts: Sequence[str], prompts: Sequence[int]
    ) -> ScoredRewards:
        """Rewards of N completions, each an answer to the training prompt ``prompts[n]``.

        Of several threads one after the other: no function has to stand being called twice at once.
        """
        with self._one_at_a_time:
            return score_completions(
                rewards,
                [self.data.train.examples[i].prompt for i in prompts],
                self.data.train.answers(prompts, texts),
                self.data.train.columns(prompts),
                on_error=self.config.on_reward_error,
            )

    def solved(self, texts: Sequence[str], prompts: Sequence[int]) -> Tensor:
        """float64 [N]: whether each completion solves its prompt."""
        assert self.data.task.solved is not None
        solved = Reward("solved", self.data.task.solved)
        if self.config.reward_timeout is not None:
            solved = Reward("solved", solved.function, timeout=self.config.reward_timeout)
        return self.score([solved], texts, prompts).total

    def known(
        self, scored: ScoredRewards, texts: Sequence[str], prompts: Sequence[int]
    ) -> dict[tuple[int, str], ScoredRewards]:
        """By prompt and completion, what the intermediate functions would say of it again."""
        if not self.intermediate:
            return {}
        each = zip(prompts, texts, scored.only(self.intermediate), strict=True)
        return {(prompt, text): reward for prompt, text, reward in each if reward is not None}


def intermediate_total(scored: ScoredRewards, rewards: Sequence[Reward]) -> Tensor:
    """Weighted sum [N] of the reward functions that score one-step completions.

    NaN where the sample was skipped; a function that does not apply to a sample adds nothing.
    """
    chosen = [scored.per_function[r.name] * r.weight for r in rewards if r.intermediate]
    total = torch.stack(chosen).nansum(0) if chosen else torch.zeros_like(scored.total)
    return total.where(~scored.total.isnan(), float("nan"))


def warn_of_failures(step: int, scored: ScoredRewards) -> None:
    """Say how many samples of a step were skipped, and why the first one was."""
    if scored.errors:
        logger.warning(
            "step %d: %d of %d samples skipped: %s%s",
            *(step, scored.skipped, len(scored.total), scored.errors[0]),
            f" (and {len(scored.errors) - 1} more)" if len(scored.errors) > 1 else "",
        )
