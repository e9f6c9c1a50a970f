"""Selected states: the canvases before the selected steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from egspo.rollouts.trajectory import Trajectory, block_starts


@dataclass(frozen=True)
class States:
    """M selected states, by rank and then by trajectory; padding is left out."""

    trajectory: Trajectory
    row: Tensor
    """int64 [M], trajectory of each state."""
    rank: Tensor
    """int64 [M], column of each state in the selection."""
    step: Tensor
    """int64 [M], denoising step of each state."""
    ranks: int
    """K, columns of the selection."""

    @classmethod
    def from_selection(cls, trajectory: Trajectory, selected: Tensor) -> States:
        """States of ``selected`` int64 [B, K], -1 at padding."""
        rank, row = (selected.t() >= 0).nonzero(as_tuple=True)
        return cls(trajectory, row, rank, selected[row, rank], selected.shape[1])

    def __len__(self) -> int:
        return self.row.shape[0]

    def prompt_lengths(self) -> Tensor:
        """int64 [M], tokens of the prompt of each state."""
        return self.trajectory.prompts.mask.sum(1)[self.row]

    def block_starts(self, block_length: int, *, causal: bool = False) -> Tensor:
        """int64 [M], first position of the block that the step of each state is in.

        Blocks are counted from the first token of the completion, or of the prompt with ``causal``.
        """
        revealed = self.trajectory.unmask_step[self.row] == self.step[:, None]
        before = self.prompt_lengths() if causal else torch.zeros_like(self.row)
        return block_starts(revealed.int().argmax(1), before, block_length)

    def take(self, index: Tensor) -> States:
        """The states at int64 ``index``."""
        return States(
            self.trajectory, self.row[index], self.rank[index], self.step[index], self.ranks
        )

    def groups(
        self, ranks: int | Sequence[Sequence[int]] | None, *, by_trajectory: bool = False
    ) -> list[Tensor]:
        """State indices int64 [m] in the order of replay; one optimizer step per group.

        Args:
            ranks: None for a single group; the ranks of each group; or a number, for one group per
                rank below it.
            by_trajectory: keep the states of a trajectory together, in the order of their steps,
                so that those of a block share the pass that makes its cache.

        States with prompts of similar length stand together, the longest first.
        """
        index = torch.arange(len(self), device=self.row.device)
        if by_trajectory:
            index = (self.row * self.trajectory.num_steps + self.step).argsort()
        lengths = self.prompt_lengths()[index]
        index = index[lengths.argsort(descending=True, stable=True)]
        if ranks is None:
            return [index]
        groups = [[rank] for rank in range(ranks)] if isinstance(ranks, int) else ranks
        of = self.rank[index]
        return [index[torch.isin(of, of.new_tensor(list(group)))] for group in groups]

    def micro_batches(
        self,
        size: int,
        *,
        ranks: int | Sequence[Sequence[int]] | None,
        by_trajectory: bool = False,
    ) -> list[list[Tensor]]:
        """:meth:`groups` in micro-batches of at most ``size`` states."""
        groups = self.groups(ranks, by_trajectory=by_trajectory)
        return [list(torch.split(group, size)) if group.numel() else [] for group in groups]
