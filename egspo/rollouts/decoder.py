"""The hidden states a denoising step is sampled from, the same in rollout and in training.

The policy is the decoder, with its cache and its guidance: with ``cache: none`` every step sees the
whole canvas by full attention. With a block cache, keys and values are made once per block, from
the canvas before its first step, and a step recomputes only

* ``prefix``: the active block and everything after it, attending to what is cached before it;
* ``dual``: the active block alone, attending to cached columns on both sides.

That is another function than full attention. It is trained without bias because log-probabilities
are those of this very function: the state of a step includes the canvas its cache was made from.

Classifier-free guidance combines two passes, the second without the prompt. The head is linear, so
guided hidden states have the guided logits: everything after them needs no second thought.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from egspo.config import BlockCache
from egspo.models.cache import KeyValueCache
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import PromptBatch


@dataclass
class Sequences:
    """B sequences at the start of a block, each at its own."""

    prompts: PromptBatch
    padded: bool
    """Whether any of the prompts is padded."""
    canvas: Tensor
    """int64 [B, L]."""
    starts: list[int]
    """First position of each block."""
    ids: Tensor
    """int64 [B], identity of each sequence."""
    cache: KeyValueCache | None = None
    """Of finished blocks, with a block-causal model."""

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True)
class Window:
    """Hidden states of a part of every completion."""

    hidden: Tensor
    """[B, N, D]."""
    first: Tensor
    """int64 [B], completion position of the first of the N."""
    experts: Tensor | None = None
    """int16 [B, n, R, K], of every column that the pass computed, the N last ones of which these
    are; None where they are not recorded."""

    def rows(self, sequence: Tensor, position: Tensor) -> Tensor:
        """[M, D] at int64 [M] ``sequence`` and completion ``position``."""
        return self.hidden[sequence, position - self.first[sequence]]


@dataclass(frozen=True)
class BlockContext:
    """What the steps of a block have in common; made by :meth:`Decoder.begin_block`."""

    prompt_ids: Tensor
    """int64 [C * B, P]: C is 2 with guidance (the second copy has its prompt masked), else 1."""
    attention_mask: Tensor | None
    """bool [C * B, P + L]."""
    start: Tensor
    """int64 [B], first position of the active block."""
    earliest: int
    """Lower bound of ``start``."""
    cache: KeyValueCache | None = None
    """Of C * B sequences."""
    built: Tensor | None = None
    """[B, L, D] hidden states of the pass that made the cache."""

    def take(self, rows: Tensor) -> BlockContext:
        """The sequences at int64 ``rows``, which may repeat."""
        copies = self.prompt_ids.shape[0] // self.start.shape[0]
        every = torch.cat([rows + copy * self.start.shape[0] for copy in range(copies)])
        return BlockContext(
            self.prompt_ids[every],
            None if self.attention_mask is None else self.attention_mask[every],
            self.start[rows],
            self.earliest,
            None if self.cache is None else self.cache.take(every),
            None if self.built is None else self.built[rows],
        )


@dataclass(frozen=True)
class Decoder:
    """Hidden states of completions of L tokens in blocks of ``block_length``.

    Args:
        denoiser: the model.
        block_length: positions of a block.
        cache: ``none`` for full attention, or a block cache.
        guidance: strength s of classifier-free guidance; the hidden states are
            ``un + (1 + s) (cond - un)``. 0 for none.
        detach_cache: no gradient through the pass that makes the cache. The gradient is then
            biased: it leaves out how the weights move the cached keys and values.
    """

    denoiser: Denoiser
    block_length: int
    cache: BlockCache = "none"
    guidance: float = 0.0
    detach_cache: bool = False

    def begin(self, batch: Sequences) -> BlockContext:
        """:meth:`begin_block` of a rollout's sequences."""
        start = torch.tensor(batch.starts, device=batch.canvas.device)
        return self.begin_block(
            batch.prompts, batch.canvas, start, earliest=min(batch.starts), padded=batch.padded
        )

    def begin_block(
        self, prompts: PromptBatch, canvas: Tensor, start: Tensor, *, earliest: int, padded: bool
    ) -> BlockContext:
        """Prepare for the steps of a block, which may be another one in every sequence.

        Args:
            prompts: B prompts.
            canvas: int64 [B, L], completions before the first step of the block.
            start: int64 [B], position of its first token.
            earliest: lower bound of ``start``, known without looking at it.
            padded: whether any prompt is padded.
        """
        prompt_ids, mask = prompts.ids, None
        if padded:
            mask = torch.nn.functional.pad(prompts.mask, (0, canvas.shape[1]), value=True)
        if self.guidance:
            without = torch.full_like(prompt_ids, self.denoiser.mask_id).where(
                prompts.mask, prompt_ids
            )
            prompt_ids = torch.cat([prompt_ids, without])
            mask = None if mask is None else mask.repeat(2, 1)
        context = BlockContext(prompt_ids, mask, start, earliest)
        if self.cache == "none":
            return context
        with torch.no_grad() if self.detach_cache else nullcontext():
            ids = torch.cat([prompt_ids, self._copies(canvas)], dim=1)
            hidden, cache = self.denoiser.hidden_states_and_cache(ids, mask)
        built = self._guided(hidden[:, prompt_ids.shape[1] :])
        return BlockContext(prompt_ids, mask, start, earliest, cache, built)

    def window(self, context: BlockContext, canvas: Tensor) -> Window:
        """Hidden states at the active block, at least.

        Args:
            context: of the block.
            canvas: int64 [B, L], completions before the step.
        """
        prompt_ids, length = context.prompt_ids, canvas.shape[1]
        if context.cache is None:
            ids = torch.cat([prompt_ids, self._copies(canvas)], dim=1)
            hidden = self.denoiser.hidden_states(ids, context.attention_mask)
            hidden = self._guided(hidden[:, prompt_ids.shape[1] :])
            return Window(hidden, torch.zeros_like(context.start))
        # Where a head row predicts the next position, the pass begins one column earlier.
        shift = self.denoiser.prediction_shift
        if self.cache == "dual":
            first, count = context.start, self.block_length
        else:
            first = torch.full_like(context.start, context.earliest)
            count = length - context.earliest
        offsets = torch.arange(-shift, count, device=canvas.device)
        positions = first[:, None] + offsets
        sequence = torch.cat([prompt_ids, self._copies(canvas)], dim=1)
        columns = self._copies(positions) + prompt_ids.shape[1]
        live = None
        if self.cache == "prefix":
            live = self._copies(positions >= context.start[:, None] - shift)
        hidden = self.denoiser.cached_hidden_states(
            sequence.gather(1, columns), context.attention_mask, context.cache, columns, live
        )
        return Window(self._guided(hidden[:, shift:]), first)

    def completions(self, context: BlockContext, window: Window) -> Tensor:
        """Hidden states [B, L, D]; where a step computes none, those that made the cache."""
        if context.built is None:
            return window.hidden
        width = window.hidden.shape[1]
        positions = window.first[:, None] + torch.arange(width, device=window.first.device)
        index = positions[:, :, None].expand_as(window.hidden)
        return context.built.scatter(1, index, window.hidden)

    def _copies(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if self.guidance else tensor

    def _guided(self, hidden: Tensor) -> Tensor:
        """[B, N, D] of [C * B, N, D]."""
        if not self.guidance:
            return hidden
        wide = hidden.double() if hidden.dtype == torch.float64 else hidden.float()
        conditional, unconditional = wide.chunk(2)
        guided = unconditional + (1 + self.guidance) * (conditional - unconditional)
        return guided.to(hidden.dtype)
