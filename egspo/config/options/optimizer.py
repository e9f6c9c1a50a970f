"""The optimizer and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from egspo.config.options.checks import require


@dataclass
class OptimizerConfig:
    """AdamW; the defaults are the published settings."""

    name: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """``sgd`` has momentum and nothing else. The others but the first are AdamW by bitsandbytes:
    moments in 8 bits, or paged to host memory (GPU only)."""

    learning_rate: float = 3e-5
    """At its highest, after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the two moments; of ``sgd``, the first is the momentum."""
    weight_decay: float = 0.1
    """Decoupled; norms and biases have none."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 0.2
    """Longer gradients are scaled down to it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after the warm-up; the last two end at 0."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm", "eps"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be > 0, got {value}")
        for name in ("weight_decay", "warmup_steps"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must be >= 0, got {value}")
        require(
            all(0 <= beta < 1 for beta in self.betas), f"betas must be in [0, 1), got {self.betas}"
        )
        require(
            self.name != "sgd" or self.weight_decay == 0,
            f"weight_decay ({self.weight_decay}) is decoupled, which sgd has not: set it to 0",
        )
