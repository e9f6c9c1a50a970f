"""Steps that had nothing to update on: said at once, counted, and not for ever."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

logger = logging.getLogger("egspo")

EMPTY = "skipped/steps"
"""The metric: how many steps in a row, up to this one, made no update."""


class EmptyRunError(RuntimeError):
    """Step after step there was nothing to learn from."""


class EmptySteps:
    """Counts them in a row.

    Args:
        limit: ``max_empty_steps``.
        sequences: completions of a step.
        made: metrics of the steps made before.
    """

    def __init__(
        self, limit: int | None, sequences: int, made: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self.limit, self.sequences, self.count = limit, sequences, 0
        for record in made:
            self.count = int(record.get(EMPTY) or 0)

    def after(self, step: int, metrics: dict[str, Any], *, updated: bool) -> None:
        """Count a step, in ``metrics`` too, and say why it was empty when a row of them begins."""
        self.count = 0 if updated else self.count + 1
        metrics[EMPTY] = self.count
        if self.count == 1:
            logger.warning("step %d made no update: %s", step, self._reason(metrics))

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises EmptyRunError where there are too many in a row."""
        if self.limit is not None and self.count >= self.limit:
            raise EmptyRunError(
                f"{self.count} steps in a row, up to step {step}, made no update "
                f"(max_empty_steps={self.limit}): {self._reason(metrics)}"
            )

    def _reason(self, metrics: Mapping[str, Any]) -> str:
        if metrics["skipped/rewards"] == self.sequences:
            return (
                f"none of the {self.sequences} completions has a reward: every function returned "
                "None or failed"
            )
        if metrics["reward/equal_groups"]:
            return (
                f"in {metrics['reward/equal_groups']} groups all completions have the same reward, "
                f"{metrics['reward/mean']:.4g} on average, so that there is nothing to prefer; "
                "a model that sometimes succeeds, easier prompts, a reward with more values or a "
                "larger group_size would change that"
            )
        return (
            "no denoising step was a candidate: the completions are empty (algorithm.stop_at_eos)"
        )
