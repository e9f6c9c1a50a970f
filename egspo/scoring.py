"""Replay of the selected states: old log-probabilities and greedy completions in one pass.

A *state* is the canvas before a selected step of one trajectory. Replay and update run the same
forward on the same micro-batches of states, so that on the first update the probability ratio is
1: bit for bit on a CPU, up to rounding elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from egspo.config import AlgorithmConfig, GenerationConfig
from egspo.decoder import BlockContext, Decoder, Window
from egspo.denoiser import Denoiser
from egspo.trajectory import PromptBatch, Trajectory
from egspo_kernels import Surrogate, aggregate_steps, linear_stepwise_surrogate, linear_token_stats


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

    @classmethod
    def from_selection(cls, trajectory: Trajectory, selected: Tensor) -> States:
        """States of ``selected`` int64 [B, K], -1 at padding."""
        rank, row = (selected.t() >= 0).nonzero(as_tuple=True)
        return cls(trajectory, row, rank, selected[row, rank])

    def __len__(self) -> int:
        return self.row.shape[0]

    def micro_batches(
        self, size: int, *, ranks: int | None, by_trajectory: bool = False
    ) -> list[list[Tensor]]:
        """Groups of micro-batches of state indices; one optimizer step per group.

        Args:
            size: states in a micro-batch, at most.
            ranks: None for a single group; otherwise one group per rank in [0, ranks).
            by_trajectory: keep the states of a trajectory together, in the order of their steps,
                so that those of a block share the pass that makes its cache.
        """
        index = torch.arange(len(self), device=self.row.device)
        if by_trajectory:
            index = (self.row * self.trajectory.num_steps + self.step).argsort()
        groups = [index] if ranks is None else [index[self.rank == r] for r in range(ranks)]
        return [list(torch.split(group, size)) if group.numel() else [] for group in groups]


@dataclass(frozen=True)
class Scores:
    """What replay found for M states."""

    old_log_prob: Tensor
    """float [M], aggregated over the tokens of the step as the loss does."""
    ref_log_prob: Tensor | None
    """float [M], the same under the reference policy (``kl: k3``)."""
    ref_hidden: dict[int, Tensor] | None
    """First state of a micro-batch -> reference hidden states of its revealed tokens (``kl:
    exact``)."""
    completions: Tensor | None
    """int64 [M, L], greedy one-step completion of every state, where asked for."""


@dataclass(frozen=True)
class Scorer:
    """The forward pass that replay and update share."""

    denoiser: Denoiser
    algorithm: AlgorithmConfig
    generation: GenerationConfig

    @property
    def temperature(self) -> float:
        """Of the scored log-probabilities."""
        return 1.0 if self.algorithm.ratio_temperature == "one" else self.generation.temperature

    @property
    def decoder(self) -> Decoder:
        """The one that the rollout sampled with."""
        generation = self.generation
        return Decoder(
            self.denoiser,
            generation.block_length,
            generation.cache,
            generation.guidance,
            self.algorithm.detach_cache,
        )

    @torch.no_grad()
    def replay(
        self,
        states: States,
        groups: list[list[Tensor]],
        *,
        complete: bool,
        on_completions: Callable[[Tensor, Tensor], object] = lambda index, completions: None,
    ) -> Scores:
        """Score every state under the behaviour policy, before any update.

        Args:
            states: M states.
            groups: their micro-batches.
            complete: also make the greedy one-step completions.
            on_completions: called with int64 [m] and the one-step completions [m, L] of each
                micro-batch as soon as it is done.
        """
        tokens, beta = states.trajectory.tokens, self.algorithm.beta
        completions = tokens.new_empty(len(states), tokens.shape[1]) if complete else None
        old_log_prob = torch.empty(len(states), dtype=torch.float64, device=tokens.device)
        ref_log_prob = torch.empty_like(old_log_prob) if beta > 0 else None
        ref_hidden: dict[int, Tensor] = {}
        for index in (micro for group in groups for micro in group):
            with self.denoiser.autocast():
                batch = _Batch.build(states, index, self.generation.block_length)
                context = batch.context(self.decoder)
                window = self.decoder.window(context, batch.canvas)
                log_prob, argmax = self._revealed(batch, batch.revealed_rows(window))
                old_log_prob[index] = log_prob.double()
                if completions is not None:
                    hidden = self.decoder.completions(context, window)
                    completions[index] = greedy = self._greedy(batch, hidden, argmax)
                    on_completions(index, greedy)
                if ref_log_prob is not None:
                    with self.denoiser.reference():
                        context = batch.context(self.decoder)
                        window = self.decoder.window(context, batch.canvas)
                        rows = batch.revealed_rows(window)
                        if self.algorithm.kl == "exact":
                            ref_hidden[int(index[0])] = rows
                        else:
                            ref_log_prob[index] = self._revealed(batch, rows)[0].double()
        exact = self.algorithm.kl == "exact"
        return Scores(
            old_log_prob,
            None if exact else ref_log_prob,
            ref_hidden if exact and beta > 0 else None,
            completions,
        )

    def surrogate(
        self, states: States, index: Tensor, scores: Scores, advantage: Tensor, weight: float
    ) -> Surrogate:
        """Loss of one micro-batch of states, each weighted by ``weight``; differentiable.

        Args:
            states, scores: M states and what replay found.
            index: int64 [m], the micro-batch, as in replay.
            advantage: float [M].
            weight: of each state in the loss.
        """
        config = self.algorithm
        with self.denoiser.autocast():
            batch = _Batch.build(states, index, self.generation.block_length)
            context = batch.context(self.decoder)
            hidden = batch.revealed_rows(self.decoder.window(context, batch.canvas))
            self.denoiser.work.head_rows += hidden.shape[0]
            ref_hidden = ref_weight = ref_log_prob = None
            if scores.ref_hidden is not None:
                ref_hidden = scores.ref_hidden[int(index[0])]
                with self.denoiser.reference():
                    ref_weight = self.denoiser.head_weight
            if scores.ref_log_prob is not None:
                ref_log_prob = scores.ref_log_prob[index]
            return linear_stepwise_surrogate(
                hidden,
                self.denoiser.head_weight,
                batch.targets,
                batch.step_ids,
                scores.old_log_prob[index],
                advantage[index],
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                beta=config.beta,
                kl=config.kl if config.beta > 0 else None,
                ref_hidden=ref_hidden,
                ref_weight=ref_weight,
                ref_log_prob=ref_log_prob,
                weights=torch.full_like(advantage[index], weight),
                bias=self.denoiser.head_bias,
                temperature=self.temperature,
                banned_token=self.denoiser.mask_id,
                aggregation=config.aggregation,
            )

    def _revealed(self, batch: _Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Step log-probability [m] and argmax [N] of the revealed tokens."""
        self.denoiser.work.head_rows += rows.shape[0]
        stats = linear_token_stats(
            rows,
            self.denoiser.head_weight,
            batch.targets,
            bias=self.denoiser.head_bias,
            temperature=self.temperature,
            banned_token=self.denoiser.mask_id,
        )
        assert stats.log_prob is not None
        log_prob = aggregate_steps(
            stats.log_prob, batch.step_ids, len(batch), self.algorithm.aggregation
        )
        return log_prob, stats.argmax

    def _greedy(self, batch: _Batch, hidden: Tensor, revealed_argmax: Tensor) -> Tensor:
        """Greedy one-step completions [m, L]: the argmax at every masked position.

        The revealed rows are not multiplied by the head again; keeping them in a product of their
        own also gives replay the matrix shapes of the update.
        """
        completion = batch.canvas.clone()
        completion[batch.revealed] = revealed_argmax
        rest = batch.masked & ~batch.revealed
        rows = hidden[rest]
        self.denoiser.work.head_rows += rows.shape[0]
        completion[rest] = linear_token_stats(
            rows,
            self.denoiser.head_weight,
            None,
            bias=self.denoiser.head_bias,
            banned_token=self.denoiser.mask_id,
        ).argmax
        return completion


@dataclass(frozen=True)
class _Batch:
    """m states as model input, and the tokens their steps revealed."""

    trajectory: Trajectory
    row: Tensor
    """int64 [m]."""
    start: Tensor
    """int64 [m], first position of the block that the step is in."""
    canvas: Tensor
    """int64 [m, L]."""
    masked: Tensor
    """bool [m, L], still masked in the state."""
    revealed: Tensor
    """bool [m, L], revealed by the step: N tokens in all."""
    targets: Tensor
    """int64 [N]."""
    step_ids: Tensor
    """int64 [N] in [0, m)."""
    positions: Tensor
    """int64 [N]."""

    @classmethod
    def build(cls, states: States, index: Tensor, block_length: int) -> _Batch:
        trajectory, row, step = states.trajectory, states.row[index], states.step[index]
        unmask_step = trajectory.unmask_step[row]
        revealed = unmask_step == step[:, None]
        step_ids, positions = revealed.nonzero(as_tuple=True)
        return cls(
            trajectory=trajectory,
            row=row,
            start=revealed.int().argmax(1) // block_length * block_length,
            canvas=trajectory.canvas(row, step),
            masked=unmask_step >= step[:, None],
            revealed=revealed,
            targets=trajectory.tokens[row][revealed],
            step_ids=step_ids,
            positions=positions,
        )

    def __len__(self) -> int:
        return self.canvas.shape[0]

    def context(self, decoder: Decoder) -> BlockContext:
        """What the decoder had at the block of each state.

        With a cache that is a pass of its own, made once for all states of a block.
        """
        row, start, place = self.row, self.start, None
        if decoder.cache != "none":
            length = self.canvas.shape[1]
            blocks, place = torch.unique(row * length + start, return_inverse=True)
            row, start = blocks // length, blocks % length
        prompts = PromptBatch(self.trajectory.prompts.ids[row], self.trajectory.prompts.mask[row])
        context = decoder.begin_block(
            prompts,
            self.trajectory.block_canvas(row, start),
            start,
            earliest=int(start.min()),
            padded=not bool(prompts.mask.all()),
        )
        return context if place is None else context.take(place)

    def revealed_rows(self, window: Window) -> Tensor:
        """Hidden states [N, D] that the revealed tokens were sampled from."""
        return window.rows(self.step_ids, self.positions)
