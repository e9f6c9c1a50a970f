"""An engine that keeps gradients and leaves the weights alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from egspo.config import OptimizerConfig
from egspo.engines.optimization import build_optimizer
from egspo.engines.processes import Processes
from egspo.engines.whole import WholeModel


class Recorder(WholeModel):
    """Takes no step: what would be one is a gradient more in :attr:`gradients`."""

    name = "recorder"

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        super().__init__(model, lambda m: build_optimizer(m, OptimizerConfig()), processes)
        self.gradients: list[Tensor] = []
        """float32 [parameters] each."""

    def clip(self, max_grad_norm: float) -> float:
        return super().clip(math.inf)

    def step(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        self.gradients.append(torch.cat([part.flatten() for part in parts]))
        self.optimizer.zero_grad(set_to_none=True)

    def taken(self) -> list[Tensor]:
        """The gradients since the last call."""
        taken, self.gradients = self.gradients, []
        return taken
