"""Denoising one block of a batch of completions, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from egspo.config import EntropyOver, EntropyReduce, GenerationConfig
from egspo.rollouts.decoder import Sequences, Window
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
        )

    def _advance(
        self, index: int, quotas: list[int], context: Any, rows: Tensor, masked: int
    ) -> None:
        """One step of the sequences ``rows`` [R], which have ``masked`` masks in their blocks."""
        with self.decoder.denoiser.autocast():
            canvas = self.canvas[rows, self.margin : self.canvas.shape[1] - self.margin]
            window = self.decoder.window(context, canvas)
        known = self.step[rows] >= 0
        # Stable: by sequence, then from left to right.
        flat = known.flatten().int().argsort(stable=True)[:masked]
        sequence, offset = flat // known.shape[1], flat % known.shape[1]
        positions = self.positions[rows[sequence], offset]
        hidden = window.rows(sequence, positions)
        sample, score = self._sample(index, hidden, rows[sequence], positions)

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
            self._entropy(entropy, known, chosen, valid, window, rows),
        )

    def _sample(
        self, index: int, hidden: Tensor, rows: Tensor, positions: Tensor
    ) -> tuple[SampledTokens, Tensor]:
        """Samples and unmasking scores of hidden states [M, D], in parts where M is large."""
        denoiser, config = self.decoder.denoiser, self.config
        weight = denoiser.head_weight
        part = max(1, LOGITS_BYTES // (weight.shape[0] * weight.element_size()))
        samples, scores = [], []
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
        merged = (torch.cat(values) for values in zip(*samples, strict=True))
        return SampledTokens(*merged), torch.cat(scores)

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

    def _record(self, index: int, rows: Tensor, log_prob: Tensor, entropy: Tensor) -> None:
        self.log_prob[rows, index] = log_prob.to(self.log_prob.dtype)
        self.entropy[rows, index] = entropy.to(self.entropy.dtype)

    def _entropy(
        self,
        entropy: Tensor,
        known: Tensor,
        chosen: Tensor,
        valid: Tensor,
        window: Window,
        rows: Tensor,
    ) -> Tensor:
        """Step entropies [R] from those of the masked positions of the block [R, W]."""
        over = self.recording.entropy_over
        if over == "revealed":
            entropy, member = entropy.gather(1, chosen), valid
        else:
            member = ~known
            if over == "masked":
                later, outside = self._later_entropy(window, rows)
                entropy = torch.cat([entropy, later], dim=1)
                member = torch.cat([member, outside], dim=1)
        total = entropy.masked_fill(~member, 0.0).sum(1)
        return total if self.recording.entropy_reduce == "sum" else total / member.sum(1)

    def _later_entropy(self, window: Window, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Entropies [R, L] of the blocks not begun, masked throughout; and where those are."""
        denoiser, length = self.decoder.denoiser, self.config.max_new_tokens
        end = self.start[rows] + self.config.block_length
        later = torch.arange(length, device=rows.device) >= end[:, None]
        sequence, position = later.nonzero(as_tuple=True)
        with denoiser.autocast():
            stats = linear_token_stats(
                window.rows(sequence, position),
                denoiser.head_weight,
                None,
                bias=denoiser.head_bias,
                temperature=self.recording.entropy_temperature,
                banned_token=denoiser.mask_id,
            )
        denoiser.work.head_rows += len(sequence)
        entropy = stats.entropy.new_zeros(later.shape)
        entropy[sequence, position] = stats.entropy
        return entropy, later


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
