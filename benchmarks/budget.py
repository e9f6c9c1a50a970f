"""A budget of hours, and what it left no time for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Budget:
    """Work is begun while it is expected to end in time; what is not begun is remembered.

    Args:
        hours: None for as long as it takes.
        clock: seconds.
    """

    hours: float | None
    clock: Callable[[], float] = time.monotonic
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.hours is not None and self.hours < 0:
            raise ValueError(f"hours must be >= 0, got {self.hours}")
        self._start = self.clock()

    def allows(self, what: str, expected: float = 0.0) -> bool:
        """Whether ``what``, of so many ``expected`` seconds, is to be begun."""
        if self.hours is None:
            return True
        left = 3600 * self.hours - (self.clock() - self._start)
        if left > expected:
            return True
        self.left_out.append(what)
        return False
