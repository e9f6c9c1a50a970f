"""Rewards in the background: of completions that have ended, while others are still denoised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from egspo.rewards.scoring import ScoredRewards
from egspo.tasks import Reward

Score = Callable[[Sequence[Reward], Sequence[str], Sequence[int]], ScoredRewards]
"""(reward functions, N completions, the prompt that each answers) -> their rewards."""


class RewardQueue:
    """Scores N completions part by part in a thread, the parts one after the other.

    A context manager: leaving it by an exception drops what was not begun.

    Args:
        score: called in the thread.
        rewards: the functions.
        known: rewards by (prompt, completion) of earlier completions, which are not scored again.
    """

    def __init__(
        self,
        score: Score,
        rewards: Sequence[Reward],
        known: dict[tuple[int, str], ScoredRewards] | None = None,
    ) -> None:
        self._score, self._rewards, self._known = score, rewards, known or {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        self._parts: list[tuple[list[int], Future[ScoredRewards] | ScoredRewards]] = []
        self._texts: dict[int, str] = {}

    def add(self, places: Sequence[int], texts: Sequence[str], prompts: Sequence[int]) -> None:
        """Begin to score completions.

        Args:
            places: which of the N they are.
            texts: the completions.
            prompts: the prompt of each.
        """
        self._texts.update(zip(places, texts, strict=True))
        fresh = []
        for number, sample in enumerate(zip(prompts, texts, strict=True)):
            if sample in self._known:
                self._parts.append(([places[number]], self._known[sample]))
            else:
                fresh.append(number)
        if fresh:
            given = [texts[i] for i in fresh], [prompts[i] for i in fresh]
            future = self._pool.submit(self._score, self._rewards, *given)
            self._parts.append(([places[i] for i in fresh], future))

    def collect(self, count: int) -> tuple[list[str], ScoredRewards]:
        """Wait for the rewards; the N completions and their rewards.

        Raises:
            RewardError: of the first part that failed.
        """
        parts = [
            (places, part if isinstance(part, ScoredRewards) else part.result())
            for places, part in self._parts
        ]
        names = [reward.name for reward in self._rewards]
        return [self._texts[i] for i in range(count)], ScoredRewards.join(names, parts, count)

    def close(self) -> None:
        """Drop what was not begun, without waiting for the rest."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
