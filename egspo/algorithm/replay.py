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

from egspo.algorithm.micro_batches import Columns, MicroBatches
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, GenerationConfig
from egspo.rollouts.causal import CausalDecoder, Replayed
from egspo.rollouts.decoder import BlockContext, Decoder, Window
from egspo.rollouts.decoding import Decoding, decoder_of
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.routing import StateExperts
from egspo.rollouts.trajectory import PromptBatch, Trajectory
from egspo_kernels import (
    Surrogate,
    TokenStats,
    aggregate_steps,
    linear_stepwise_surrogate,
    linear_token_stats,
)


@dataclass(frozen=True)
class Scores:
    """What replay found for M states."""

    old_log_prob: Tensor | None
    """float [M], aggregated over the tokens of the step as the loss does, or [M, L] where an
    objective compares single tokens; None where it is that of the update's own pass."""
    recorded: Tensor
    """float64 [M], the same by the rollout, in the shapes and the precision of its passes. NaN
    where nothing is known that the first ratio could be checked by."""
    ref_log_prob: Tensor | None
    """float [M] or [M, L], the same under the reference policy (``kl: k3`` or ``k2``)."""
    ref_hidden: list[Tensor] | None
    """Of every state, reference hidden states [n, D] of its revealed tokens (``kl: exact``)."""
    completions: Tensor | None
    """int64 [M, L], greedy one-step completion of every state, where asked for."""
    groups: list[list[Tensor]]
    """The micro-batches that were replayed: those given, split where memory ran out."""


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
    def decoder(self) -> Decoding:
        """The one that the rollout sampled with."""
        return decoder_of(self.denoiser, self.generation, detach_cache=self.algorithm.detach_cache)

    @torch.no_grad()
    def replay(
        self,
        states: States,
        groups: list[list[Tensor]],
        *,
        complete: bool,
        old: bool = True,
        on_completions: Callable[[Tensor, Tensor], object] = lambda index, completions: None,
        limit: MicroBatches | None = None,
    ) -> Scores:
        """Score every state under the behaviour policy, before any update.

        Args:
            states: M states.
            groups: their micro-batches.
            complete: also make the greedy one-step completions.
            old: whether log-probabilities of the policy are needed before the update.
            on_completions: called with int64 [m] and the one-step completions [m, L] of each
                micro-batch as soon as it is done.
            limit: splits what does not fit into memory; None raises torch.OutOfMemoryError.
        """
        scores = self._unscored(states, complete, old)
        if not (complete or old or self.algorithm.beta > 0):
            scores.groups.extend(groups)
            return scores

        def work(index: Tensor) -> None:
            self._score(states, index, scores)
            if scores.completions is not None:
                on_completions(index, scores.completions[index])

        if limit is not None:
            scores.groups.extend(limit.each(states, groups, work))
            return scores
        for group in groups:
            for index in group:
                work(index)
        scores.groups.extend(groups)
        return scores

    def _unscored(self, states: States, complete: bool, old: bool) -> Scores:
        """Room for what replay finds."""
        tokens, config, count = states.trajectory.tokens, self.algorithm, len(states)
        log_prob = torch.empty(count, dtype=torch.float64, device=tokens.device)
        k3, exact = (config.beta > 0 and config.kl == kind for kind in ("k3", "exact"))
        return Scores(
            old_log_prob=log_prob if old else None,
            recorded=self._recorded(states),
            ref_log_prob=torch.empty_like(log_prob) if k3 else None,
            ref_hidden=[log_prob.new_empty(0)] * count if exact else None,
            completions=tokens.new_empty(count, tokens.shape[1]) if complete else None,
            groups=[],
        )

    def _recorded(self, states: States) -> Tensor:
        """What the rollout recorded of the steps, at the temperature of the scores."""
        trajectory = states.trajectory
        revealed = trajectory.unmask_step[states.row] == states.step[:, None]
        if self.temperature == self.generation.temperature:
            total = trajectory.log_prob[states.row, states.step].double()
        else:  # the other temperature is 1
            token = trajectory.confidence[states.row].double().log()
            total = token.masked_fill(~revealed, 0.0).sum(1)
        return total / revealed.sum(1) if self.algorithm.aggregation == "mean" else total

    def _score(self, states: States, index: Tensor, scores: Scores) -> None:
        """Fill in ``scores`` at the micro-batch ``index``."""
        with self.denoiser.autocast():
            batch, complete = self._batch(states, index), scores.completions is not None
            if complete or scores.old_log_prob is not None:
                window, context = batch.window(
                    self.decoder, keep=complete, replay_experts=self.algorithm.replay_experts
                )
                self.denoiser.work.head_rows += len(batch.targets)
                log_prob, argmax = self._revealed(batch, batch.revealed_rows(window))
                if scores.old_log_prob is not None:
                    scores.old_log_prob[index] = log_prob.double()
                if scores.completions is not None:
                    scores.completions[index] = self._completed(batch, window, context, argmax)
            if scores.ref_log_prob is None and scores.ref_hidden is None:
                return
            with self.denoiser.reference():
                rows = batch.revealed_rows(batch.window(self.decoder)[0])
                if scores.ref_log_prob is not None:
                    self.denoiser.work.head_rows += len(batch.targets)
                    scores.ref_log_prob[index] = self._revealed(batch, rows)[0].double()
                if scores.ref_hidden is not None:
                    counts = batch.step_ids.bincount(minlength=len(batch)).tolist()
                    for state, part in zip(index.tolist(), torch.split(rows, counts), strict=True):
                        scores.ref_hidden[state] = part

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
        assert config.kl != "k2"  # refused by the options
        with self.denoiser.autocast():
            batch = self._batch(states, index)
            window, _ = batch.window(self.decoder, replay_experts=config.replay_experts)
            hidden = batch.revealed_rows(window)
            self.denoiser.work.head_rows += hidden.shape[0]
            if scores.old_log_prob is not None:
                old_log_prob = scores.old_log_prob[index]
            else:
                self.denoiser.work.scored_rows += hidden.shape[0]
                with torch.no_grad():
                    old_log_prob = self._revealed(batch, hidden.detach())[0].double()
            ref_hidden = ref_weight = ref_log_prob = None
            if scores.ref_hidden is not None:
                ref_hidden = torch.cat([scores.ref_hidden[i] for i in index.tolist()])
                with self.denoiser.reference():
                    ref_weight = self.denoiser.head_weight
            if scores.ref_log_prob is not None:
                ref_log_prob = scores.ref_log_prob[index]
            return linear_stepwise_surrogate(
                hidden,
                self.denoiser.head_weight,
                batch.targets,
                batch.step_ids,
                old_log_prob,
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
        stats = self._stats(batch, rows)
        assert stats.log_prob is not None
        log_prob = aggregate_steps(
            stats.log_prob, batch.step_ids, len(batch), self.algorithm.aggregation
        )
        return log_prob, stats.argmax

    def token_log_probs(self, states: States, index: Tensor) -> Tensor:
        """Of every token that the steps of a micro-batch reveal, [m, L]; 0 elsewhere.

        Differentiable, without a canvas of logits.

        Args:
            states: M states.
            index: int64 [m], the micro-batch.
        """
        with self.denoiser.autocast():
            batch = self._batch(states, index)
            hidden = batch.revealed_rows(batch.window(self.decoder)[0])
            self.denoiser.work.head_rows += hidden.shape[0]
            log_prob = self._stats(batch, hidden).log_prob
        assert log_prob is not None
        empty = log_prob.new_zeros(batch.canvas.shape)
        return empty.index_put((batch.step_ids, batch.positions), log_prob)

    def _stats(self, batch: _Batch, rows: Tensor) -> TokenStats:
        """Of the revealed tokens."""
        return linear_token_stats(
            rows,
            self.denoiser.head_weight,
            batch.targets,
            bias=self.denoiser.head_bias,
            temperature=self.temperature,
            banned_token=self.denoiser.mask_id,
        )

    def _batch(self, states: States, index: Tensor) -> _Batch:
        causal, taken = self.denoiser.block_size is not None, states.take(index)
        shares = causal and Columns.of(
            taken, self.generation, 0, causal, self.algorithm.share_prompts
        ).shares(range(len(taken)))
        return _Batch.build(
            taken, self.generation.block_length, causal=causal, share_prompts=shares
        )

    def _completed(
        self,
        batch: _Batch,
        window: Window,
        context: BlockContext | Replayed | None,
        revealed_argmax: Tensor,
    ) -> Tensor:
        """Greedy one-step completions [m, L]: the argmax at every masked position.

        The revealed rows are not multiplied by the head again; keeping them in a product of their
        own also gives replay the matrix shapes of the update. With a block-causal model that is
        the argmax in the active block, and what :meth:`CausalDecoder.completions` makes of it.
        """
        decoder, rest = self.decoder, batch.masked & ~batch.revealed
        if isinstance(decoder, CausalDecoder):
            position = torch.arange(rest.shape[1], device=rest.device)
            rest = rest & (position < batch.start[:, None] + decoder.block_length)
            rows = window.rows(*rest.nonzero(as_tuple=True))
        else:
            assert isinstance(context, BlockContext)
            rows = decoder.completions(context, window)[rest]
        completion = batch.canvas.clone()
        completion[batch.revealed] = revealed_argmax
        self.denoiser.work.head_rows += rows.shape[0]
        completion[rest] = linear_token_stats(
            rows,
            self.denoiser.head_weight,
            None,
            bias=self.denoiser.head_bias,
            banned_token=self.denoiser.mask_id,
        ).argmax
        if isinstance(decoder, CausalDecoder):
            assert isinstance(context, Replayed)
            later = self.algorithm.completion_blocks == "all"
            return decoder.completions(context, completion, later=later)
        return completion


@dataclass(frozen=True)
class _Batch:
    """m states as model input, and the tokens their steps revealed."""

    trajectory: Trajectory
    row: Tensor
    """int64 [m]."""
    step: Tensor
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
    share_prompts: bool
    """Whether trajectories share the columns of their prompts, with a block-causal model."""

    @classmethod
    def build(
        cls, states: States, block_length: int, *, causal: bool, share_prompts: bool
    ) -> _Batch:
        trajectory, row, step = states.trajectory, states.row, states.step
        unmask_step = trajectory.unmask_step[row]
        revealed = unmask_step == step[:, None]
        step_ids, positions = revealed.nonzero(as_tuple=True)
        return cls(
            trajectory=trajectory,
            row=row,
            step=step,
            start=states.block_starts(block_length, causal=causal),
            canvas=trajectory.canvas(row, step),
            masked=unmask_step >= step[:, None],
            revealed=revealed,
            targets=trajectory.tokens[row][revealed],
            step_ids=step_ids,
            positions=positions,
            share_prompts=share_prompts,
        )

    def __len__(self) -> int:
        return self.canvas.shape[0]

    def window(
        self, decoder: Decoding, *, keep: bool = False, replay_experts: bool | None = None
    ) -> tuple[Window, BlockContext | Replayed | None]:
        """Hidden states of the active block of each state, at least.

        Also what one-step completions need beside it: with a block-causal model if ``keep``.
        Where the rollout recorded experts, the pass takes them with ``replay_experts``, and is
        compared with them without; None for passes of the reference policy, which has its own.
        """
        if not isinstance(decoder, CausalDecoder):
            context = self._context(decoder)
            return decoder.window(context, self.canvas), context
        row, place = torch.unique(self.row, return_inverse=True)
        whole, recorded = self.trajectory.prompts, self.trajectory.experts
        prompts, experts = PromptBatch(whole.ids[row], whole.mask[row])[:], None
        if recorded is not None and replay_experts is not None:
            columns = prompts.ids.shape[1] + self.canvas.shape[1]
            blocks, clean = recorded.steps[self.row, self.step], recorded.clean[row, -columns:]
            experts = StateExperts(blocks, clean, replay_experts)
        given = (prompts, self.trajectory.tokens[row], place, self.start, self.canvas)
        return decoder.states(*given, keep=keep, experts=experts, share_prompts=self.share_prompts)

    def _context(self, decoder: Decoder) -> BlockContext:
        """What the decoder had at the block of each state.

        With a cache that is a pass of its own, made once for all states of a block.
        """
        row, start, place = self.row, self.start, None
        if decoder.cache != "none":
            length = self.canvas.shape[1]
            blocks, place = torch.unique(row * length + start, return_inverse=True)
            row, start = blocks // length, blocks % length
        prompts = self.trajectory.prompts
        prompts = PromptBatch(prompts.ids[row], prompts.mask[row])[:]  # no padding common to all
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
