"""Micro-batches of states: packed to a limit, and to half of it where memory runs out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from egspo.config import GenerationConfig, SharePrompts
from egspo.rollouts.work import Work

if TYPE_CHECKING:
    from egspo.algorithm.states import States

logger = logging.getLogger("egspo")

SPARED = 0.2
"""Share of the columns from which on a pass for the prompts is worth it: docs/block_models.md."""


@dataclass(frozen=True)
class Columns:
    """How many columns a forward pass over states computes: padding, caches and guidance included.

    One entry per state in each of the lists.
    """

    generation: GenerationConfig
    prediction_shift: int
    """Of the model, as :attr:`egspo.rollouts.denoiser.Denoiser.prediction_shift`."""
    row: Sequence[int]
    """Trajectory of each state."""
    prompt: Sequence[int]
    """Tokens of its prompt."""
    start: Sequence[int]
    """First position of the block of its step."""
    causal: bool = False
    """Whether the model is block-causal: all states of a trajectory share a pass."""
    answered: Sequence[int] = ()
    """Of a block-causal model: which prompt it is."""
    share_prompts: SharePrompts = "never"
    """Of a block-causal model, as ``algorithm.share_prompts``."""

    @classmethod
    def of(
        cls,
        states: States,
        generation: GenerationConfig,
        prediction_shift: int,
        causal: bool = False,
        share_prompts: SharePrompts = "never",
    ) -> Columns:
        """Of M states."""
        return cls(
            generation,
            prediction_shift,
            states.row.tolist(),
            states.prompt_lengths().tolist(),
            states.block_starts(generation.block_length, causal=causal).tolist(),
            causal,
            states.trajectory.prompts.distinct()[1][states.row].tolist() if causal else (),
            share_prompts,
        )

    def work(self, index: Sequence[int]) -> Work:
        """The passes of the policy over a micro-batch of the states ``index``, without the head."""
        generation, length, work = self.generation, self.generation.max_new_tokens, Work()
        copies = 2 if generation.guidance else 1
        prompt = max(self.prompt[i] for i in index)
        if self.causal:
            return self._together(index) if self.shares(index) else self._apart(index)
        width = prompt + length
        if generation.cache == "none":
            work.add(copies * len(index), width, width)
            return work
        blocks = {(self.row[i], self.start[i]) for i in index}
        window = generation.block_length
        if generation.cache == "prefix":
            window = length - min(self.start[i] for i in index)
        work.add(copies * len(blocks), width, width)
        work.add(copies * len(index), window + self.prediction_shift, width)
        return work

    def shares(self, index: Sequence[int]) -> bool:
        """Whether trajectories of the micro-batch share their prompts: with ``auto``, where that
        spares enough columns for the pass that it takes. (It spares pairs, too.)"""
        if not self.causal or self.share_prompts != "auto":
            return self.causal and self.share_prompts == "always"
        return self._together(index).spared_columns >= SPARED * self._apart(index).tokens

    def _apart(self, index: Sequence[int]) -> Work:
        """The clean columns of every trajectory, and a copy of the block of each state."""
        work, states = Work(), Counter(self.row[i] for i in index)
        clean = max(self.prompt[i] for i in index) + max(self.start[i] for i in index)
        columns = clean + max(states.values()) * self.generation.block_length
        work.add(len(states), columns, columns)
        return work

    def _together(self, index: Sequence[int]) -> Work:
        """The same with the whole blocks of different prompts in a pass of their own."""
        work, size, apart = Work(), self.generation.block_length, self._apart(index)
        columns = apart.tokens // apart.sequences
        prompt, tails = max(self.prompt[i] for i in index), [self.prompt[i] % size for i in index]
        whole, own = max(prompt - min(tails), 1), columns - (prompt - max(tails))
        work.add(len({self.answered[i] for i in index}), whole, whole)
        work.add(apart.sequences, own, columns)
        work.spared_columns = apart.tokens - work.tokens
        return work

    def count(self, index: Sequence[int]) -> int:
        """Columns of the same."""
        return self.work(index).tokens

    def split(self, index: list[int], size: int | None, tokens: int | None) -> list[list[int]]:
        """``index`` in micro-batches of at most ``tokens`` columns, or ``size`` states."""
        if tokens is not None:
            return self.packed(index, tokens)
        assert size is not None
        return [index[begin : begin + size] for begin in range(0, len(index), size)]

    def packed(self, index: Sequence[int], most: int, together: int = 1) -> list[list[int]]:
        """``index``, in its order, in micro-batches of at most ``most`` columns or ``together``
        states; so many are never parted."""
        micro_batches: list[list[int]] = []
        for begin in range(0, len(index), together):
            states = index[begin : begin + together]
            if micro_batches and self.count([*micro_batches[-1], *states]) <= most:
                micro_batches[-1].extend(states)
            else:
                micro_batches.append(list(states))
        return micro_batches


class MicroBatches:
    """How many states share a forward pass of replay and update.

    What does not fit into memory is split, and the limit halved from then on. The gradient does
    not depend on the split but for rounding.

    Args:
        size: states in a micro-batch, at most; or None for
        tokens: columns that its forward pass computes, at most. A state with more goes alone.
        generation: how the states were denoised.
        prediction_shift: of the model.
        causal: whether it is block-causal.
        share_prompts: of a block-causal model, as ``algorithm.share_prompts``.

    Attributes:
        together: so many states, one after the other, are never parted; a micro-batch has as many
            at least.
    """

    def __init__(
        self,
        size: int | None,
        tokens: int | None,
        generation: GenerationConfig,
        prediction_shift: int,
        causal: bool = False,
        share_prompts: SharePrompts = "auto",
    ) -> None:
        if (size is None) == (tokens is None):
            raise ValueError(f"give one of size and tokens, got size={size} and tokens={tokens}")
        self.size, self.tokens = size, tokens
        self.generation, self.prediction_shift = generation, prediction_shift
        self.causal, self.share_prompts = causal, share_prompts
        self.together = 1

    def plan(
        self, states: States, *, ranks: int | Sequence[Sequence[int]] | None
    ) -> list[list[Tensor]]:
        """Groups of micro-batches of M states; one optimizer step per group.

        Args:
            states: M states.
            ranks: of the groups, as :meth:`egspo.algorithm.states.States.groups` has them.

        Returns:
            int64 [m] indices of states, by group and micro-batch. States with long prompts come
            first: what comes later fits where they did.
        """
        groups = states.groups(ranks, by_trajectory=self.causal or self.generation.cache != "none")
        return [self.split(states, [group] if group.numel() else []) for group in groups]

    def split(self, states: States, micro_batches: Sequence[Tensor]) -> list[Tensor]:
        """Those of ``micro_batches`` that are over the limit in parts, the others as they are."""
        if self.tokens is None:
            assert self.size is not None
            size = max(self.size // self.together, 1) * self.together
            return [part for index in micro_batches for part in torch.split(index, size)]
        columns = self._columns(states)
        return [
            torch.tensor(part, device=index.device)
            for index in micro_batches
            for part in columns.packed(index.tolist(), self.tokens, self.together)
        ]

    def shrink(
        self, states: States, index: Tensor, doing: str, error: torch.OutOfMemoryError
    ) -> None:
        """Half the limit, as ``doing`` the micro-batch ``index`` memory ran out by ``error``.

        Raises:
            torch.OutOfMemoryError: ``error``, where the micro-batch cannot be parted.
        """
        count, tokens = len(index), self._columns(states).count(index.tolist())
        if count <= self.together:
            fewest = "one state" if count == 1 else f"{count} canvases of one completion"
            error.add_note(
                f"egspo: even {doing} {fewest} of {tokens} columns does not fit; `egspo plan "
                "RECIPE --gpu-memory SIZE` says what would make it fit"
            )
            raise error
        if self.tokens is None:
            self.size = count // 2
            setting = f"micro_batch_size={self.size}"
        else:
            self.tokens = tokens // 2
            setting = f"micro_batch_tokens={self.tokens}"
        logger.warning(
            "out of memory %s %d states (%d columns) at a time: going on with half (%s would "
            "begin there)",
            *(doing, count, tokens, setting),
        )

    def each(
        self, states: States, groups: list[list[Tensor]], work: Callable[[Tensor], None]
    ) -> list[list[Tensor]]:
        """Do ``work`` on every micro-batch of ``groups``, in parts where memory runs out.

        Returns:
            The micro-batches as they were done.

        Raises:
            torch.OutOfMemoryError: even what cannot be parted does not fit.
        """
        done: list[list[Tensor]] = []
        for group in groups:
            waiting = list(group)
            done.append([])
            while waiting:
                index = waiting[0]
                try:
                    work(index)
                except torch.OutOfMemoryError as error:
                    self.shrink(states, index, "replaying", error)
                else:
                    done[-1].append(waiting.pop(0))
                    continue
                release_memory(index.device)  # now that the error holds no tensors
                waiting = self.split(states, waiting)
        return done

    def give_up(self, states: States, index: Tensor, error: torch.OutOfMemoryError) -> NoReturn:
        """Raise ``error`` with what to set, where other processes are in the middle of the pass."""
        columns = self._columns(states).count(index.tolist())
        smaller = (
            f"micro_batch_size={max(len(index) // 2, 1)}"
            if self.tokens is None
            else f"micro_batch_tokens={columns // 2}"
        )
        error.add_note(
            f"egspo: an update on {len(index)} states ({columns} columns) at a time does not fit, "
            f"and a sharded model cannot begin again by itself: set {smaller}"
        )
        raise error

    def _columns(self, states: States) -> Columns:
        return Columns.of(
            states, self.generation, self.prediction_shift, self.causal, self.share_prompts
        )


def release_memory(device: torch.device) -> None:
    """Give back to the GPU what the allocator holds in pieces too small for the next attempt."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
