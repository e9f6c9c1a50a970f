"""The supervised warm start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from egspo.config.options.checks import require
from egspo.config.options.optimizer import OptimizerConfig


@dataclass
class SFTConfig:
    """Masked-diffusion supervised training: the warm start of a new model, or ``egspo sft``."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Examples of a step."""
    seed: int = 0
    """Of masks and order."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Over ``task.options``, for the supervised examples alone: easier ones, for example. Options
    that decide which examples are held out must stay as they are."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.01, max_grad_norm=1.0
        )
    )
    log_every: int = 20
    """Steps between two lines of ``sft_metrics.jsonl``."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            value = getattr(self, name)
            require(value > 0, f"sft.{name} must be > 0, got {value}")
