"""Held-out evaluation during training."""

from __future__ import annotations

from dataclasses import dataclass

from egspo.config.options.checks import require


@dataclass
class EvalConfig:
    """Greedy decoding of held-out prompts."""

    every: int = 10
    """RL steps between evaluations; 0 evaluates at the start and the end only. A group of
    trajectories of the same steps is kept for ``egspo inspect`` and the sample table."""
    examples: int | None = None
    """Held-out prompts; None for all of them."""
    temperature: float = 0.0
    """0 is greedy."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a better held-out reward; None never does."""

    def __post_init__(self) -> None:
        require(
            self.patience is None or self.patience > 0,
            f"eval.patience must be > 0, or null to train to the end, got {self.patience}",
        )
        require(self.every >= 0, f"eval.every must be >= 0, got {self.every}")
        require(
            self.examples is None or self.examples > 0,
            f"eval.examples must be > 0, or null for all, got {self.examples}",
        )
        require(self.temperature >= 0, f"eval.temperature must be >= 0, got {self.temperature}")
