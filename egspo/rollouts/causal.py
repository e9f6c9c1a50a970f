"""Denoising with block-causal models: finished blocks are cached exactly, a step sees one block.

Blocks are counted from the first token of the prompt. A prompt of P tokens leaves ``P % B`` of them
in the first block to denoise, so the blocks of a completion begin at ``-(P % B)`` and then every B
positions, and the last one ends where the completion does.

A step of a block is a function of the tokens of the blocks before it and of its own canvas. Hence

* the rollout keeps the keys and values of finished blocks, and computes the columns of one block a
  step; the clean pass of a finished block rides with the first step of the next one;
* replay and update have *all* selected states of a trajectory in one pass: the clean columns, and
  behind them a copy of the block of each state; trajectories that answer the same prompt may share
  its columns (:mod:`egspo.rollouts.streams`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from egspo.models.cache import KeyValueCache
from egspo.models.routes import Routes
from egspo.rollouts.decoder import Sequences, Window
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.routing import StateExperts
from egspo.rollouts.streams import Streams
from egspo.rollouts.trajectory import PromptBatch
from egspo_kernels import linear_token_stats


@dataclass
class Steps:
    """What the steps of a block have in common; made by :meth:`CausalDecoder.begin`.

    The S columns are B of room, the prompt, the completion, and B of room again.
    """

    prompt_ids: Tensor
    """int64 [B, P], padded on the left."""
    attention_mask: Tensor
    """bool [B, high - low]."""
    start: Tensor
    """int64 [B], first position of the block."""
    cache: KeyValueCache
    """Of the columns [``low``, ``high``)."""
    low: int
    riding: bool
    """Whether the next pass also computes the block before this one, which is clean now."""

    def take(self, rows: Tensor) -> Steps:
        """The sequences at int64 ``rows``, which may repeat."""
        return replace(
            self,
            prompt_ids=self.prompt_ids[rows],
            attention_mask=self.attention_mask[rows],
            start=self.start[rows],
            cache=self.cache.take(rows),
        )


@dataclass(frozen=True)
class Replayed:
    """What replay keeps of a pass for the one-step completions of its M states."""

    prompts: PromptBatch
    """Of the R trajectories."""
    cache: KeyValueCache
    """Of the prompts and of what is clean behind them."""
    place: Tensor
    """int64 [M], which of the trajectories each state is of."""
    start: Tensor
    """int64 [M], first position of the block of each state."""


@dataclass(frozen=True)
class CausalDecoder:
    """Hidden states of completions in blocks of ``block_length``, the model's own.

    Args:
        denoiser: a block-causal model.
        block_length: B, positions of a block.
        record: also give the experts of each step.
    """

    denoiser: Denoiser
    block_length: int
    record: bool = False

    def begin(self, batch: Sequences) -> Steps:
        """Prepare for the steps of a block, which may be another one in every sequence."""
        assert batch.cache is not None
        return self._steps(batch.prompts, batch.canvas, batch.starts, batch.cache)

    def _steps(
        self, prompts: PromptBatch, canvas: Tensor, starts: list[int], cache: KeyValueCache
    ) -> Steps:
        size = self.block_length
        mask = F.pad(prompts.mask, (size, 0), value=False)
        mask = F.pad(mask, (0, canvas.shape[1]), value=True)
        mask = F.pad(mask, (0, size), value=False)
        first = size + prompts.ids.shape[1]
        low, high = 0, cache.length
        if not self.denoiser.replaying:  # a graph is of one shape
            padding = int((~prompts.mask).sum(1).min())
            low = min(size + padding, first + min(starts) - size)
            high = first + max(starts) + size
        return Steps(
            prompts.ids,
            mask[:, low:high],
            torch.tensor(starts, device=canvas.device),
            cache.narrow(low, high),
            low,
            # Whoever is at the first block has what is before it from the prompt.
            riding=max(starts) > 0,
        )

    def window(self, context: Steps, canvas: Tensor) -> Window:
        """Hidden states of the active block.

        Args:
            context: of the block.
            canvas: int64 [B, L], completions before the step.
        """
        size, riding = self.block_length, context.riding
        room = canvas.new_full((canvas.shape[0], size), self.denoiser.mask_id)
        every = torch.cat([room, context.prompt_ids, canvas, room], dim=1)
        offsets = torch.arange(-size if riding else 0, size, device=canvas.device)
        columns = size + context.prompt_ids.shape[1] + context.start[:, None] + offsets
        routes = Routes() if self.record else None
        with self.denoiser.eagerly() if riding else nullcontext():
            hidden = self.denoiser.cached_hidden_states(
                every.gather(1, columns),
                context.attention_mask,
                context.cache,
                columns - context.low,
                None,
                routes,
            )
        context.riding = False
        experts = None if routes is None else routes.stacked()
        return Window(hidden[:, -size:], context.start, experts)

    def states(
        self,
        prompts: PromptBatch,
        tokens: Tensor,
        place: Tensor,
        start: Tensor,
        canvas: Tensor,
        *,
        keep: bool = False,
        experts: StateExperts | None = None,
        share_prompts: bool = False,
    ) -> tuple[Window, Replayed | None]:
        """Hidden states [M, B, D] of the blocks of M states, by one pass over R trajectories.

        Args:
            prompts: of the R trajectories.
            tokens: int64 [R, L], their completions.
            place: int64 [M], trajectory of each state.
            start: int64 [M], first position of the block of each state.
            canvas: int64 [M, L], completions before the steps.
            keep: also return what :meth:`completions` needs.
            experts: that the rollout chose.
            share_prompts: compute what trajectories have of the same prompt once, in a pass before.
        """
        size, width, device = self.block_length, prompts.ids.shape[1], tokens.device
        trajectories = tokens.shape[0]
        # Blocks before the last one that is needed; the rest of a sequence need not exist.
        clean = width + int(start.max())
        number, copies = _numbered(place, trajectories)
        blocks = self._blocks(prompts, place, start, canvas)
        ids, there, where = (
            part.new_full((trajectories, copies, size), fill).index_put((place, number), part)
            for part, fill in zip(blocks, (self.denoiser.mask_id, False, 0), strict=True)
        )
        stream = torch.arange(1, copies + 1, device=device).repeat_interleave(size)
        sequence = torch.cat([prompts.ids, tokens], dim=1)[:, :clean]
        mask = F.pad(prompts.mask, (0, tokens.shape[1]), value=True)[:, :clean]
        position = (mask.cumsum(1) - 1).clamp(min=0)
        streams = Streams(
            torch.cat([sequence, ids.flatten(1)], dim=1),
            torch.cat([mask, there.flatten(1)], dim=1),
            torch.cat([position, where.flatten(1)], dim=1),
            F.pad(stream, (clean, 0)).expand(trajectories, -1),
        )
        if experts is not None:
            needed = torch.arange(clean, device=device) < width + _last(place, start, trajectories)
            streams = replace(
                streams,
                experts=experts.of_pass(place, number, copies, clean),
                replay=experts.replay,
                computed=F.pad(needed, (0, copies * size), value=True),
            )
        if share_prompts:
            hidden, cache = streams.shared_hidden_states(self.denoiser, prompts, size, keep=keep)
        else:
            hidden, cache = streams.hidden_states(self.denoiser, keep=keep)
        drawn = hidden[:, hidden.shape[1] - copies * size :]
        rows = drawn.reshape(len(drawn), copies, size, -1)[place, number]
        if cache is None:
            return Window(rows, start), None
        return Window(rows, start), Replayed(prompts, cache.narrow(0, clean), place, start)

    def _blocks(
        self, prompts: PromptBatch, place: Tensor, start: Tensor, canvas: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, whether they are there, and positions of the blocks of M states, [M, B] each."""
        width = prompts.ids.shape[1]
        positions = start[:, None] + torch.arange(self.block_length, device=start.device)
        whole = torch.cat([prompts.ids[place], canvas], dim=1)
        ids = whole.gather(1, (width + positions).clamp(max=whole.shape[1] - 1))
        lengths = prompts.mask.sum(1)[place]
        return ids, positions < canvas.shape[1], lengths[:, None] + positions

    @torch.no_grad()
    def completions(self, replayed: Replayed, canvas: Tensor, *, later: bool) -> Tensor:
        """One-step completions int64 [M, L] of states whose blocks have been filled greedily.

        Args:
            replayed: of the states.
            canvas: int64 [M, L], with tokens at every position of the states' blocks.
            later: fill each later block too, greedily in one step behind what is then known, up
                to the end or the first EOS; otherwise the completions end with those blocks.
        """
        size, length, eos = self.block_length, canvas.shape[1], self.denoiser.eos_id
        every = torch.arange(length, device=canvas.device)
        starts: list[int] = replayed.start.tolist()
        canvas = canvas.masked_fill(every >= (replayed.start + size)[:, None], eos)
        if not later:
            return canvas
        width = replayed.prompts.ids.shape[1]
        prompts = PromptBatch(
            replayed.prompts.ids[replayed.place], replayed.prompts.mask[replayed.place]
        )
        alive = torch.arange(canvas.shape[0], device=canvas.device)
        cache = replayed.cache.room(len(alive), width + length + 2 * size)
        cache.put(alive, size, replayed.cache, replayed.place)
        while True:
            begun = torch.tensor([s + size for s in starts], device=canvas.device)
            ended = ((canvas[alive] == eos) & (every < begun[:, None])).any(1)
            keep = (~ended & (begun < length)).nonzero()[:, 0]
            if not len(keep):
                return canvas
            if len(keep) < len(alive):
                alive, cache = alive[keep], cache.take(keep)
                prompts = PromptBatch(prompts.ids[keep], prompts.mask[keep])
            starts = begun[keep].tolist()
            canvas[alive] = self._filled(prompts, canvas[alive], starts, cache)

    def _filled(
        self, prompts: PromptBatch, canvas: Tensor, starts: list[int], cache: KeyValueCache
    ) -> Tensor:
        """``canvas`` with the blocks at ``starts`` filled greedily in one step."""
        steps = self._steps(prompts, canvas, starts, cache)
        steps.riding = True
        positions = steps.start[:, None] + torch.arange(self.block_length, device=canvas.device)
        row, offset = (positions < canvas.shape[1]).nonzero(as_tuple=True)
        masked = canvas.index_put(
            (row, positions[row, offset]), canvas.new_tensor(self.denoiser.mask_id)
        )
        hidden = self.window(steps, masked).hidden[row, offset]
        self.denoiser.work.head_rows += len(row)
        best = linear_token_stats(
            hidden,
            self.denoiser.head_weight,
            None,
            bias=self.denoiser.head_bias,
            banned_token=self.denoiser.mask_id,
        ).argmax
        return masked.index_put((row, positions[row, offset]), best)


def _numbered(place: Tensor, trajectories: int) -> tuple[Tensor, int]:
    """Number of each state among those of its trajectory, int64 [M], and the most of any."""
    order = place.argsort(stable=True)
    sizes = torch.bincount(place, minlength=trajectories)
    number = torch.empty_like(place)
    before = (sizes.cumsum(0) - sizes)[place[order]]
    number[order] = torch.arange(len(place), device=place.device) - before
    return number, int(sizes.max())


def _last(place: Tensor, start: Tensor, trajectories: int) -> Tensor:
    """int64 [R, 1], where the last block of each trajectory begins. Clean columns from there on are
    in a pass for other trajectories, and the rollout may not have computed them."""
    last = start.new_zeros(trajectories)
    return last.scatter_reduce(0, place, start, "amax", include_self=False)[:, None]
