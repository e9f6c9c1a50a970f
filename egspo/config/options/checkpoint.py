"""Checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from egspo.config.options.checks import require


@dataclass
class CheckpointConfig:
    every: int = 50
    """RL steps between checkpoints; 0 saves at the end only."""
    keep_last: int = 2
    """Checkpoints; older ones are removed."""
    keep_best: bool = True
    """Also save the step of the best held-out reward so far, and keep it."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every must be >= 0, got {self.every}")
        require(self.keep_last > 0, f"checkpoint.keep_last must be > 0, got {self.keep_last}")
