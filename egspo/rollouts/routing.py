"""Experts that a rollout chose: what replay and update are compared with, or take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from egspo.models.routes import Routes


@dataclass(frozen=True)
class RecordedExperts:
    """Of B sequences in a model of R layers with experts, K of them for each token."""

    steps: Tensor
    """int16 [B, T, W, R, K], of the W columns of the block that each step computed."""
    clean: Tensor
    """int16 [B, P + L, R, K], of the prompt and of finished blocks."""

    @classmethod
    def empty(cls, shape: tuple[int, int, int], columns: int, like: Tensor) -> RecordedExperts:
        """Room for ``shape`` (B, T, W), R and K being those of ``like`` [..., R, K]."""
        return cls(
            like.new_zeros(*shape, *like.shape[-2:]),
            like.new_zeros(shape[0], columns, *like.shape[-2:]),
        )

    def take(self, rows: Tensor) -> RecordedExperts:
        """The sequences at int64 ``rows``."""
        return RecordedExperts(self.steps[rows], self.clean[rows])

    def until(self, step: int) -> RecordedExperts:
        """Without the steps from ``step`` on."""
        return RecordedExperts(self.steps[:, :step], self.clean)

    @classmethod
    def concatenate(cls, parts: Sequence[RecordedExperts]) -> RecordedExperts:
        """Join batches that may differ in prompt width."""
        width = max(part.clean.shape[1] for part in parts)
        padded = [F.pad(p.clean, (0, 0, 0, 0, width - p.clean.shape[1], 0)) for p in parts]
        return cls(torch.cat([part.steps for part in parts]), torch.cat(padded))


@dataclass(frozen=True)
class StateExperts:
    """What a rollout chose in the M states of R trajectories."""

    blocks: Tensor
    """int16 [M, W, R', K], of the columns of their blocks."""
    clean: Tensor
    """int16 [R, P + L, R', K]."""
    replay: bool
    """Whether a pass takes them; otherwise it is compared with them alone."""

    def of_pass(self, place: Tensor, number: Tensor, copies: int, clean: int) -> Tensor:
        """int16 [R, clean + copies * W, R', K], in the order of the columns of a pass.

        Args:
            place, number: int64 [M], trajectory of each state, and its number there.
            copies: the most states of a trajectory.
            clean: columns before the copies.
        """
        blocks = self.blocks.new_zeros(len(self.clean), copies, *self.blocks.shape[1:])
        blocks[place, number] = self.blocks
        return torch.cat([self.clean[:, :clean], blocks.flatten(1, 2)], dim=1)


@dataclass
class Agreement:
    """Pairs of a token and a layer in replay and update, and in how many of them the routers
    choose the experts that they chose in the rollout."""

    counts: list[Tensor] = field(default_factory=list)
    """int64 [2] of each pass: the same, and all."""

    def add(self, routes: Routes, recorded: Tensor, real: Tensor) -> None:
        """A pass.

        Args:
            routes: of it.
            recorded: int16 [B, N, R, K], of the rollout.
            real: bool [B, N], False where there is no token.
        """
        mine, theirs = (t.sort(dim=-1).values for t in (routes.stacked(), recorded))
        same = (mine == theirs).all(-1)[real]
        self.counts.append(torch.stack([same.sum(), torch.tensor(same.numel()).to(same.device)]))

    def take(self) -> tuple[int, int]:
        """The same, and all, since the last call."""
        same, total = torch.stack(self.counts).sum(0).tolist() if self.counts else (0, 0)
        self.counts = []
        return same, total
