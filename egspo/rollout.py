"""Rollout: denoise completions step by step and record what the algorithm needs."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo.config import EntropyOver, EntropyReduce, GenerationConfig
from egspo.denoiser import Denoiser
from egspo.trajectory import PromptBatch, Trajectory, length_before
from egspo.unmasking import Candidates, Step, schedule, unmasking_policy
from egspo_kernels import SampledTokens, linear_token_stats, sample_tokens


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    prompts: PromptBatch,
    config: GenerationConfig,
    *,
    seed: int,
    sequence_ids: Tensor,
    entropy_over: EntropyOver = "revealed",
    entropy_reduce: EntropyReduce = "mean",
    entropy_temperature: float = 1.0,
) -> Trajectory:
    """Denoise one completion for every prompt, ``config.batch_size`` at a time.

    All randomness is a function of (seed, step, sequence id): a sequence is the same whatever it
    shares a batch with, up to the rounding of the matrix library with the batch shape.

    Args:
        prompts: B prompts.
        config: lengths, steps, temperature (0 is greedy) and unmasking policy.
        seed: key of the noise.
        sequence_ids: int64 [B], identity of each sequence, never repeated in a run.
        entropy_over: position set of the recorded step entropy: the ``revealed`` tokens, the
            masked positions of the active ``block``, or all ``masked`` positions.
        entropy_reduce: ``mean`` or ``sum`` over that set.
        entropy_temperature: temperature of that entropy.

    Returns:
        :class:`Trajectory` of B sequences.

    Raises:
        FloatingPointError: if the model gives NaN logits.
    """
    plan = schedule(config.max_new_tokens, config.steps, config.block_length)
    if len(plan) > torch.iinfo(torch.int16).max:
        raise ValueError(f"generation.steps must be below 2**15, got {len(plan)}")
    parts = []
    for start in range(0, len(prompts), config.batch_size):
        chunk = slice(start, start + config.batch_size)
        run = _Denoising(denoiser, prompts[chunk], config, seed, sequence_ids[chunk])
        run.entropy_over, run.entropy_reduce = entropy_over, entropy_reduce
        run.entropy_temperature = entropy_temperature
        for index, step in enumerate(plan):
            run.advance(index, step)
        parts.append(run.finish())
    return Trajectory.concatenate(parts)


class _Denoising:
    """The canvas of one batch on its way from all masks to a completion."""

    entropy_over: EntropyOver
    entropy_reduce: EntropyReduce
    entropy_temperature: float

    def __init__(
        self,
        denoiser: Denoiser,
        prompts: PromptBatch,
        config: GenerationConfig,
        seed: int,
        sequence_ids: Tensor,
    ) -> None:
        self.denoiser, self.prompts, self.config, self.seed = denoiser, prompts, config, seed
        self.sequence_ids = sequence_ids
        self.policy = unmasking_policy(config.policy)
        shape, device = (len(prompts), config.max_new_tokens), prompts.ids.device
        self.canvas = torch.full(shape, denoiser.mask_id, device=device)
        self.unmask_step = torch.full(shape, -1, dtype=torch.int16, device=device)
        self.entropy: list[Tensor] = []
        self.log_prob: list[Tensor] = []
        mask = torch.nn.functional.pad(prompts.mask, (0, shape[1]), value=True)
        self.attention_mask = None if bool(prompts.mask.all()) else mask

    def advance(self, index: int, step: Step) -> None:
        """One denoising step: forward, sample the active block, reveal its best positions."""
        with self.denoiser.autocast():
            ids = torch.cat([self.prompts.ids, self.canvas], dim=1)
            hidden = self.denoiser.hidden_states(ids, self.attention_mask)
            hidden = hidden[:, self.prompts.ids.shape[1] :]
            positions = self._masked_positions(step)
            logits = self._head(_gather_rows(hidden, positions))
        sample = sample_tokens(
            logits,
            temperature=self.config.temperature,
            seed=self.seed,
            step=index,
            row_ids=self._row_ids(positions),
            banned_token=self.denoiser.mask_id,
            entropy_temperature=self.entropy_temperature,
        )
        candidates = Candidates(
            logits,
            sample,
            positions,
            self.sequence_ids,
            self.seed,
            index,
            self.config.max_new_tokens,
            self.denoiser.mask_id,
        )
        score = self.policy.score(candidates).view_as(positions)
        chosen = score.sort(dim=1, descending=True, stable=True).indices[:, : step.quota]
        self._reveal(index, positions, sample, chosen)
        self._record(step, hidden, positions, sample, chosen)

    def finish(self) -> Trajectory:
        entropy = torch.stack(self.entropy, dim=1)
        bad = entropy.isnan().any(0)
        if bool(bad.any()):
            raise FloatingPointError(
                f"the model gave NaN logits at denoising step {int(bad.int().argmax())}: "
                "its weights or its precision are broken"
            )
        return Trajectory(
            prompts=self.prompts,
            tokens=self.canvas,
            unmask_step=self.unmask_step,
            entropy=entropy,
            log_prob=torch.stack(self.log_prob, dim=1),
            lengths=length_before(self.canvas, self.denoiser.eos_id),
            mask_id=self.denoiser.mask_id,
        )

    def _masked_positions(self, step: Step) -> Tensor:
        """int64 [B, masked], left to right; the count is the schedule's, so nothing is synced."""
        known = (self.unmask_step[:, step.start : step.end] >= 0).int()
        return known.argsort(dim=1, stable=True)[:, : step.masked] + step.start

    def _row_ids(self, positions: Tensor) -> Tensor:
        return (self.sequence_ids[:, None] * self.config.max_new_tokens + positions).flatten()

    def _head(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.linear(rows, self.denoiser.head_weight, self.denoiser.head_bias)

    def _reveal(self, index: int, positions: Tensor, sample: SampledTokens, chosen: Tensor) -> None:
        revealed = positions.gather(1, chosen)
        tokens = sample.token.view_as(positions).gather(1, chosen)
        self.canvas.scatter_(1, revealed, tokens)
        self.unmask_step.scatter_(1, revealed, torch.full_like(revealed, index).to(torch.int16))

    def _record(
        self, step: Step, hidden: Tensor, positions: Tensor, sample: SampledTokens, chosen: Tensor
    ) -> None:
        log_prob = sample.log_prob.view_as(positions).gather(1, chosen)
        self.log_prob.append(log_prob.sum(1))
        entropy = sample.entropy.view_as(positions)
        if self.entropy_over == "revealed":
            entropy = entropy.gather(1, chosen)
        elif self.entropy_over == "masked" and step.end < self.config.max_new_tokens:
            entropy = torch.cat([entropy, self._later_entropy(hidden[:, step.end :])], dim=1)
        self.entropy.append(entropy.mean(1) if self.entropy_reduce == "mean" else entropy.sum(1))

    def _later_entropy(self, hidden: Tensor) -> Tensor:
        """Entropies [B, later] of the blocks not begun, which are masked throughout."""
        with self.denoiser.autocast():
            stats = linear_token_stats(
                hidden.flatten(0, 1),
                self.denoiser.head_weight,
                None,
                bias=self.denoiser.head_bias,
                temperature=self.entropy_temperature,
                banned_token=self.denoiser.mask_id,
            )
        return stats.entropy.view(hidden.shape[:2])


def _gather_rows(hidden: Tensor, positions: Tensor) -> Tensor:
    """Rows [B * M, D] of ``hidden`` [B, L, D] at ``positions`` [B, M]."""
    index = positions[:, :, None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index).flatten(0, 1)
