"""Denoising one block of a batch of completions, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egspo.config import EntropyOver, EntropyReduce, GenerationConfig
from egspo.rollouts.decoder import Decoder, Sequences, Window
from egspo.rollouts.decoding import Decoding
from egspo.rollouts.unmasking import Candidates, Step, schedule, unmasking_policy
from egspo_kernels import SampledTokens, linear_token_stats, sample_tokens

# Bound on the logits alive at once: more rows are sampled in several parts.
LOGITS_BYTES = 2**30


@dataclass(frozen=True)
class Recording:
    """What a rollout samples with and records beside the tokens."""

    seed: int
    entropy_over: EntropyOver = "revealed"
    entropy_reduce: EntropyReduce = "mean"
    entropy_temperature: float = 1.0
    complete: bool = False
    """Also the most likely token of every masked position at every step."""
    pool: bool = False
    """Also the mean hidden state of the active block before every step."""
    experts: bool = False
    """Also the experts of every token, of models that have some."""


@dataclass
class DenoisedBlock:
    """A block of W positions, denoised in at most S steps."""

    tokens: Tensor
    """int64 [B, W]."""
    step: Tensor
    """int64 [B, W], step of the block that revealed each."""
    confidence: Tensor
    """float [B, W], probability of each token at temperature 1 when it was revealed."""
    token_entropy: Tensor
    """float [B, W], entropy of each position when it was revealed."""
    entropy: Tensor
    """float [B, S], step entropies; NaN at steps not taken."""
    log_prob: Tensor
    """float [B, S], summed over the tokens revealed in a step; 0 at steps not taken."""
    steps: list[int]
    """Steps taken by each sequence."""
    greedy: Tensor | None
    """int32 [B, S, L], see :attr:`egspo.rollouts.trajectory.Trajectory.greedy`."""
    pooled: Tensor | None
    """float [B, S, D], see :attr:`egspo.rollouts.trajectory.Trajectory.pooled`."""
    experts: Tensor | None
    """int16 [B, S, W, R, K], of the block at every step, where recorded."""
    before: Tensor | None
    """int16 [B, W, R, K], of the block before, where its clean pass rode with the first step."""


class _Later(NamedTuple):
    """N positions of the blocks not begun, masked throughout."""

    sequence: Tensor
    """int64 [N] in [0, R)."""
    position: Tensor
    """int64 [N] in [0, L)."""
    entropy: Tensor
    argmax: Tensor


class BlockDenoising:
    """The steps of one block.

    A block that begins in the prompt or ends behind the completion has fewer masks, and takes fewer
    steps. Without ``threshold`` every count is the schedule's, and nothing is read back from the
    device before the block is done (but for ``entropy_over: masked``). With it, the masked
    positions left are read after every step. Sequences that are done with the block leave it.
    """

    def __init__(
        self, decoder: Decoding, config: GenerationConfig, recording: Recording, batch: Sequences
    ) -> None:
        self.decoder, self.config, self.recording, self.batch = decoder, config, recording, batch
        self.policy = unmasking_policy(config.policy)
        width, length = config.block_length, batch.canvas.shape[1]
        self.counts = [min(start + width, length) - max(start, 0) for start in batch.starts]
        """Masks of each block."""
        # Room for the positions of a block that are not of the completion.
        self.margin = width if min(self.counts) < width else 0
        self.canvas = torch.nn.functional.pad(batch.canvas, (self.margin, self.margin))
        shape, device = (len(batch), width), batch.canvas.device
        self.start = torch.tensor(batch.starts, device=device)
        dtype = torch.promote_types(decoder.denoiser.head_weight.dtype, torch.float32)
        self.positions = self.start[:, None] + torch.arange(width, device=device)
        self.step = torch.full(shape, -1, device=device)
        if self.margin:
            inside = (self.positions >= 0) & (self.positions < length)
            self.step.masked_fill_(~inside, 0)
        self.confidence = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.token_entropy = self.confidence.clone()
        self.plans = [block_plan(config, count) for count in self.counts]
        steps = (shape[0], len(block_plan(config)))
        self.entropy = torch.full(steps, float("nan"), dtype=dtype, device=device)
        self.log_prob = torch.zeros(steps, dtype=dtype, device=device)
        # Only the pass that makes the cache computes later blocks.
        self.later_once = isinstance(decoder, Decoder) and decoder.cache == "dual"
        self.greedy: Tensor | None = None
        if recording.complete:
            size = (*steps, config.max_new_tokens)
            self.greedy = torch.zeros(size, dtype=torch.int32, device=device)
        self.pooled: Tensor | None = None
        if recording.pool:
            width = decoder.denoiser.head_weight.shape[1]
            self.pooled = torch.zeros((*steps, width), dtype=dtype, device=device)
        self.experts: Tensor | None = None
        self.before: Tensor | None = None

    def run(self) -> DenoisedBlock:
        """All steps of the block."""
        alive = list(range(len(self.batch)))
        rows = torch.arange(len(alive), device=self.canvas.device)
        with self.decoder.denoiser.autocast():
            context = self.decoder.begin(self.batch)
        steps, counts = [len(plan) for plan in self.plans], list(self.counts)
        for index in range(max(steps)):
            quotas = [self.plans[row][index].quota for row in alive]
            self._advance(index, quotas, context, rows, sum(counts))
            if self.config.threshold is None:
                counts = [count - quota for count, quota in zip(counts, quotas, strict=True)]
            else:  # the one synchronisation of a step
                counts = (self.step[rows] < 0).sum(1).tolist()
            if 0 not in counts:
                continue
            for row, count in zip(alive, counts, strict=True):
                if count == 0:
                    steps[row] = index + 1
            keep = [n for n, count in enumerate(counts) if count]
            if not keep:
                break
            alive, counts = [alive[n] for n in keep], [counts[n] for n in keep]
            kept = torch.tensor(keep, device=rows.device)
            rows, context = rows[kept], context.take(kept)
        return DenoisedBlock(
            self.canvas.gather(1, self.positions + self.margin),
            self.step,
            self.confidence,
            self.token_entropy,
            self.entropy,
            self.log_prob,
            steps,
            self.greedy,
            self.pooled,
            self.experts,
            self.before,
        )

    def _advance(
        self, index: int, quotas: list[int], context: Any, rows: Tensor, masked: int
    ) -> None:
        """One step of the sequences ``rows`` [R], which have ``masked`` masks in their blocks."""
        with self.decoder.denoiser.autocast():
            canvas = self.canvas[rows, self.margin : self.canvas.shape[1] - self.margin]
            window = self.decoder.window(context, canvas)
        if self.pooled is not None:
            self.pooled[rows, index] = self._pool(window, rows).to(self.pooled.dtype)
        if window.experts is not None:
            self._keep_experts(index, rows, window.experts)
        known = self.step[rows] >= 0
        # Stable: by sequence, then from left to right.
        flat = known.flatten().int().argsort(stable=True)[:masked]
        sequence, offset = flat // known.shape[1], flat % known.shape[1]
        positions = self.positions[rows[sequence], offset]
        hidden = window.rows(sequence, positions)
        sample, score, argmax = self._sample(index, hidden, rows[sequence], positions)
        later = self._later(index, context, window, rows)
        if self.greedy is not None:
            self.greedy[rows[sequence], index, positions] = argmax
            if later is not None:
                # Those that only the pass before a block computes are the same at all its steps.
                at = slice(index, None) if self.later_once else index
                found = later.argmax.int()
                if isinstance(at, slice):
                    found = found[:, None].expand(-1, self.greedy.shape[1] - index)
                self.greedy[rows[later.sequence], at, later.position] = found

        def dense(values: Tensor, fill: float = 0) -> Tensor:
            full = values.new_full((known.numel(),), fill)
            return full.index_copy_(0, flat, values).view_as(known)

        chosen, valid = self._choose(quotas, dense(score, float("-inf")), known)
        token, log_prob, confidence, entropy = (dense(values) for values in sample)
        self._reveal(index, rows, chosen, valid, [token, confidence, entropy])
        self._record(
            index,
            rows,
            log_prob.gather(1, chosen).masked_fill(~valid, 0.0).sum(1),
            self._entropy(entropy, known, chosen, valid, later),
        )

    def _keep_experts(self, index: int, rows: Tensor, experts: Tensor) -> None:
        """Of a step, int16 [R, n, layers, K], and of what rode with it."""
        width = self.positions.shape[1]
        if self.experts is None:
            shape = (*self.entropy.shape, width, *experts.shape[2:])
            self.experts = experts.new_zeros(shape)
        if experts.shape[1] > width:  # all sequences are at their first step
            self.before = experts[:, :-width]
        self.experts[rows, index] = experts[:, -width:]

    def _sample(
        self, index: int, hidden: Tensor, rows: Tensor, positions: Tensor
    ) -> tuple[SampledTokens, Tensor, Tensor]:
        """Samples, unmasking scores and, if recorded, most likely tokens (int32) of hidden states
        [M, D], in parts where M is large."""
        denoiser, config = self.decoder.denoiser, self.config
        weight = denoiser.head_weight
        part = max(1, LOGITS_BYTES // (weight.shape[0] * weight.element_size()))
        samples, scores, argmaxes = [], [], []
        for begin in range(0, hidden.shape[0], part):
            piece = slice(begin, begin + part)
            row_ids = self.batch.ids[rows[piece]] * config.max_new_tokens + positions[piece]
            with denoiser.autocast():
                logits = denoiser.logits(hidden[piece])
            sample = sample_tokens(
                logits,
                temperature=config.temperature,
                seed=self.recording.seed,
                step=index,
                row_ids=row_ids,
                banned_token=denoiser.mask_id,
                entropy_temperature=self.recording.entropy_temperature,
            )
            candidates = Candidates(
                logits, sample, row_ids, self.recording.seed, index, denoiser.mask_id
            )
            samples.append(sample)
            scores.append(self.policy.score(candidates))
            if self.recording.complete:
                logits[:, denoiser.mask_id] = float("-inf")
                argmaxes.append(logits.argmax(1).int())
        merged = (torch.cat(values) for values in zip(*samples, strict=True))
        none = hidden.new_empty(0, dtype=torch.int32)
        return SampledTokens(*merged), torch.cat(scores), torch.cat(argmaxes or [none])

    def _choose(self, quotas: list[int], scores: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Block offsets int64 [R, K], best first, ties to the left; bool [R, K], which count."""
        config = self.config
        order = scores.sort(dim=1, descending=True, stable=True).indices
        least, most = torch.tensor(quotas, device=scores.device), max(quotas)
        if config.threshold is None:
            chosen = order[:, :most]
            if min(quotas) == most:
                return chosen, torch.ones_like(chosen, dtype=torch.bool)
            return chosen, torch.arange(most, device=scores.device) < least[:, None]
        most = config.max_tokens_per_step or config.block_length
        wanted = self.policy.above(scores, config.threshold).maximum(least).clamp(max=most)
        count = wanted.minimum((~known).sum(1))
        rank = torch.arange(most, device=scores.device)
        return order[:, :most], rank < count[:, None]

    def _reveal(
        self, index: int, rows: Tensor, chosen: Tensor, valid: Tensor, values: list[Tensor]
    ) -> None:
        """Write the chosen values [R, W] of every recorded tensor."""
        tokens, confidence, entropy = (dense.gather(1, chosen) for dense in values)
        for target, where, fresh in (
            (self.canvas, self.positions[rows].gather(1, chosen) + self.margin, tokens),
            (self.step, chosen, torch.full_like(chosen, index)),
            (self.confidence, chosen, confidence),
            (self.token_entropy, chosen, entropy),
        ):
            old = target[rows]
            fresh = fresh.to(old.dtype).where(valid, old.gather(1, where))
            target[rows] = old.scatter(1, where, fresh)

    def _pool(self, window: Window, rows: Tensor) -> Tensor:
        """Mean hidden states [R, D] of the blocks, over positions of the completion."""
        positions, length = self.positions[rows], self.config.max_new_tokens
        inside = ((positions >= 0) & (positions < length))[:, :, None]
        sequence = torch.arange(len(rows), device=rows.device)[:, None]
        hidden = window.rows(sequence, positions.clamp(0, length - 1))
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return (wide * inside).sum(1) / inside.sum(1)

    def _record(self, index: int, rows: Tensor, log_prob: Tensor, entropy: Tensor) -> None:
        self.log_prob[rows, index] = log_prob.to(self.log_prob.dtype)
        self.entropy[rows, index] = entropy.to(self.entropy.dtype)

    def _entropy(
        self,
        entropy: Tensor,
        known: Tensor,
        chosen: Tensor,
        valid: Tensor,
        later: _Later | None,
    ) -> Tensor:
        """Step entropies [R] from those of the masked positions of the block [R, W]."""
        over = self.recording.entropy_over
        if over == "revealed":
            entropy, member = entropy.gather(1, chosen), valid
        else:
            member = ~known
            if over == "masked":
                assert later is not None
                shape = (len(entropy), self.config.max_new_tokens)
                outside = torch.zeros(shape, dtype=torch.bool, device=entropy.device)
                outside[later.sequence, later.position] = True
                beyond = later.entropy.new_zeros(shape)
                beyond[later.sequence, later.position] = later.entropy
                entropy = torch.cat([entropy, beyond], dim=1)
                member = torch.cat([member, outside], dim=1)
        total = entropy.masked_fill(~member, 0.0).sum(1)
        return total if self.recording.entropy_reduce == "sum" else total / member.sum(1)

    def _later(self, index: int, context: Any, window: Window, rows: Tensor) -> _Later | None:
        """The blocks not begun, where something of them is recorded at this step."""
        wanted = self.recording.entropy_over == "masked" or self.recording.complete
        if not wanted or (self.later_once and index > 0):
            return None
        denoiser, length = self.decoder.denoiser, self.config.max_new_tokens
        end = self.start[rows] + self.config.block_length
        later = torch.arange(length, device=rows.device) >= end[:, None]
        sequence, position = later.nonzero(as_tuple=True)
        with denoiser.autocast():
            if self.later_once:
                assert isinstance(self.decoder, Decoder)
                hidden = self.decoder.completions(context, window)[sequence, position]
            else:
                hidden = window.rows(sequence, position)
            stats = linear_token_stats(
                hidden,
                denoiser.head_weight,
                None,
                bias=denoiser.head_bias,
                temperature=self.recording.entropy_temperature,
                banned_token=denoiser.mask_id,
            )
        denoiser.work.head_rows += len(sequence)
        return _Later(sequence, position, stats.entropy, stats.argmax)


def block_plan(config: GenerationConfig, masked: int | None = None) -> list[Step]:
    """The steps of a block of so many masks, None for all of its positions.

    The fewest that reveal no more at a time than in a whole block.
    """
    whole = config.block_length
    steps = config.steps // (config.max_new_tokens // whole)
    masked = whole if masked is None else masked
    return schedule(masked, -(-masked * steps // whole), masked)


def most_steps(config: GenerationConfig, block_size: int | None) -> int:
    """That a completion may take.

    Args:
        config: of the generation.
        block_size: of a block-causal model, with which the first and the last block may be parts
            of one, and may take a step more between them; None otherwise.
    """
    if block_size is None:
        return config.steps
    whole = len(block_plan(config))
    parts = [
        len(block_plan(config, n)) + len(block_plan(config, block_size - n))
        for n in range(1, block_size)
    ]
    return config.steps + max(parts, default=whole) - whole
