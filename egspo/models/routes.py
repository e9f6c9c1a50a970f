"""The experts that the tokens of a pass go through: recorded, or given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Routes:
    """Of one pass over [B, N] tokens through R layers with experts, K of them for each token."""

    given: Tensor | None = None
    """int [B, N, R, K], the experts to take; None leaves it to the routers."""
    chosen: dict[int, Tensor] = field(default_factory=dict)
    """int64 [B, N, K] by layer, what the routers choose. A layer that is recomputed in the backward
    pass chooses the same again."""

    def stacked(self) -> Tensor:
        """int16 [B, N, R, K]."""
        layers = [self.chosen[layer] for layer in sorted(self.chosen)]
        return torch.stack(layers, dim=2).to(torch.int16)
