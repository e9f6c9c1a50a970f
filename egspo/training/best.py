"""The best step of a run so far, by its held-out reward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

HELD_OUT = "eval/reward"
"""The metric that steps are compared by."""


@dataclass
class BestSoFar:
    """Updated with every evaluation; of equal rewards the first counts."""

    step: int | None = None
    reward: float = float("-inf")
    stale: int = 0
    """Evaluations since."""

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> BestSoFar:
        """From the metrics of the steps already made."""
        best = cls()
        for record in records:
            best.update(record)
        return best

    def update(self, record: Mapping[str, Any]) -> bool:
        """Take the metrics of a step; whether they are those of a new best."""
        reward = record.get(HELD_OUT)
        if reward is None:
            return False
        if reward > self.reward:
            self.step, self.reward, self.stale = int(record["step"]), float(reward), 0
            return True
        self.stale += 1
        return False
