"""Prompts, and trajectories of denoising stored without a single intermediate canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from egspo.rollouts.routing import RecordedExperts


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts, so that every completion begins at the same column."""

    ids: Tensor
    """int64 [B, P]."""
    mask: Tensor
    """bool [B, P], False at padding."""

    @classmethod
    def from_lists(
        cls, prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
    ) -> PromptBatch:
        """Pad token lists to the longest. Raises ValueError for an empty batch or prompt."""
        if not prompts:
            raise ValueError("prompts must not be empty")
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) == 0:
            raise ValueError(f"prompt {lengths.index(0)} has no tokens")
        width = max(lengths)
        ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[False] * (width - n) + [True] * n for n in lengths]
        return cls(torch.tensor(ids, device=device), torch.tensor(mask, device=device))

    def __len__(self) -> int:
        return self.ids.shape[0]

    def distinct(self) -> tuple[Tensor, Tensor]:
        """A row of each of D different prompts, int64 [D], and which of them each row is, [B]."""
        tokens = self.ids.masked_fill(~self.mask, -1)
        different, which = torch.unique(tokens, dim=0, return_inverse=True)
        every = torch.arange(len(which), device=which.device)
        first = torch.zeros_like(every[: len(different)])
        return first.scatter_reduce(0, which, every, "amin", include_self=False), which

    def __getitem__(self, index: slice) -> PromptBatch:
        """A sub-batch, without the padding columns it does not need."""
        ids, mask = self.ids[index], self.mask[index]
        needed = int(mask.any(0).int().argmax())
        return PromptBatch(ids[:, needed:], mask[:, needed:])


NEVER = torch.iinfo(torch.int16).max
"""``unmask_step`` of a position that no step revealed, as its completion had ended before."""


@dataclass(frozen=True)
class Trajectory:
    """B denoised completions of L tokens in at most T steps.

    Revealed tokens never change, so the final tokens and the step that revealed each of them give
    back every canvas: see :meth:`canvas`.
    """

    prompts: PromptBatch
    tokens: Tensor
    """int64 [B, L], the final completion; EOS where nothing was revealed."""
    unmask_step: Tensor
    """int16 [B, L], the step in [0, T) that revealed each token, or :data:`NEVER`."""
    confidence: Tensor
    """float [B, L], probability of each token at temperature 1 when it was revealed; NaN where
    nothing was."""
    token_entropy: Tensor
    """float [B, L], entropy in nats of each position when it was revealed, or NaN."""
    entropy: Tensor
    """float [B, T], step entropy in nats over the position set asked for; NaN where no step was
    taken."""
    log_prob: Tensor
    """float [B, T], summed log-probability of the tokens revealed at each step, at the sampling
    temperature; 0 at steps not taken."""
    steps: Tensor
    """int64 [B], steps taken."""
    lengths: Tensor
    """int64 [B], completion tokens before the first EOS."""
    mask_id: int
    greedy: Tensor | None = None
    """int32 [B, T, L], the most likely token of every position that is masked before a step, where
    the rollout was asked for it; what else is in it means nothing."""
    pooled: Tensor | None = None
    """float [B, T, D], mean over the active block of the hidden states before each step, where the
    rollout was asked for it; 0 at steps not taken."""
    experts: RecordedExperts | None = None
    """That the rollout chose, where it was asked for them."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_steps(self) -> int:
        return self.entropy.shape[1]

    def canvas(self, rows: Tensor, steps: Tensor) -> Tensor:
        """Completion part of the canvas before a step: int64 [M, L].

        Args:
            rows: int64 [M], which trajectories.
            steps: int64 [M], the step of each; T gives what is left after the last.
        """
        hidden = self.unmask_step[rows] >= steps[:, None]
        return self.tokens[rows].masked_fill(hidden, self.mask_id)

    def one_step_completions(self, rows: Tensor, steps: Tensor) -> Tensor:
        """Canvases before a step, completed by the most likely tokens: int64 [M, L].

        Args:
            rows, steps: as :meth:`canvas`; the steps were taken.

        Raises:
            ValueError: the rollout did not record them.
        """
        if self.greedy is None:
            raise ValueError("the rollout did not record one-step completions")
        canvas = self.canvas(rows, steps)
        return canvas.where(canvas != self.mask_id, self.greedy[rows, steps].long())

    def block_canvas(self, rows: Tensor, starts: Tensor) -> Tensor:
        """Completion part of the canvas before the first step of a block: int64 [M, L].

        Args:
            rows: int64 [M], which trajectories.
            starts: int64 [M], first position of the block of each.
        """
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return self.tokens[rows].masked_fill(position >= starts[:, None], self.mask_id)

    def take(self, rows: Tensor) -> Trajectory:
        """The trajectories at int64 ``rows`` [M]."""
        prompts = PromptBatch(self.prompts.ids[rows], self.prompts.mask[rows])
        experts = None if self.experts is None else self.experts.take(rows)
        return self._map(prompts, lambda tensors: tensors[0][rows], [self], experts)

    @classmethod
    def concatenate(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """Join batches that may differ in prompt width."""
        width = max(part.prompts.ids.shape[1] for part in parts)

        def widen(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0))

        prompts = PromptBatch(
            torch.cat([widen(part.prompts.ids) for part in parts]),
            torch.cat([widen(part.prompts.mask) for part in parts]),
        )
        recorded = [part.experts for part in parts if part.experts is not None]
        experts = RecordedExperts.concatenate(recorded) if recorded else None
        return cls._map(prompts, torch.cat, parts, experts)

    @classmethod
    def _map(  # type: ignore[no-untyped-def]
        cls,
        prompts: PromptBatch,
        function,
        parts: Sequence[Trajectory],
        experts: RecordedExperts | None,
    ) -> Trajectory:
        names = [f.name for f in fields(cls) if f.name not in ("prompts", "mask_id", "experts")]
        names = [name for name in names if getattr(parts[0], name) is not None]
        merged = {name: function([getattr(part, name) for part in parts]) for name in names}
        return cls(prompts=prompts, mask_id=parts[0].mask_id, experts=experts, **merged)


def length_before(tokens: Tensor, eos_id: int) -> Tensor:
    """Tokens before the first EOS of each row: int64 [B] from int64 [B, L]."""
    is_eos = tokens == eos_id
    return torch.where(is_eos.any(1), is_eos.int().argmax(1), tokens.shape[1])


def block_starts(positions: Tensor, prompt_lengths: Tensor, block_length: int) -> Tensor:
    """First position of the block that each completion position is in, int64 like ``positions``.

    Blocks are counted from ``prompt_lengths`` before the completion: the start is negative where
    the block begins there.
    """
    place = prompt_lengths + positions
    return place - place % block_length - prompt_lengths
