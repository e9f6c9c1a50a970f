"""Rollout: denoise completions and record what the algorithm needs.

Sequences wait in a queue, are denoised block by block in batches of similar prompt lengths, retire
as soon as their text has ended, and are replaced from the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from egspo.config import EntropyOver, EntropyReduce, GenerationConfig
from egspo.rollouts.block import BlockDenoising, DenoisedBlock, Recording, most_steps
from egspo.rollouts.causal import CausalDecoder
from egspo.rollouts.decoder import Sequences
from egspo.rollouts.decoding import decoder_of
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.graphs import check_device
from egspo.rollouts.routing import RecordedExperts
from egspo.rollouts.running_caches import RunningCaches
from egspo.rollouts.trajectory import NEVER, PromptBatch, Trajectory, length_before

logger = logging.getLogger("egspo")

# Share of the columns of a batch that may be padding, before shorter prompts wait for a batch of
# their own.
MAX_PADDING = 1 / 8


@dataclass(frozen=True)
class RolloutBlock:
    """A rollout after a block of a batch."""

    rows: list[int]
    """Sequences of the batch."""
    finished: list[int]
    """Those of them that retired."""
    run: _Rollout

    @property
    def trajectory(self) -> Trajectory:
        """All B sequences as they are now; the next block changes it."""
        return self.run.trajectory()

    @property
    def ended(self) -> Trajectory:
        """Those that retired, in the order of :attr:`finished`."""
        trajectory = self.trajectory
        index = torch.tensor(self.finished, dtype=torch.int64, device=trajectory.tokens.device)
        return trajectory.take(index)


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
    """Denoise one completion for every prompt, at most ``config.batch_size`` at a time.

    All randomness is a function of (seed, step, sequence id): a sequence is the same whatever it
    shares a batch with, up to the rounding of the matrix library with the batch shape. A batch that
    does not fit into memory is split, with a warning, and gives the same tokens.

    Args:
        prompts: B prompts.
        config: lengths, steps, temperature (0 is greedy), unmasking policy, cache and guidance.
        seed: key of the noise.
        sequence_ids: int64 [B], identity of each sequence, never repeated in a run.
        entropy_over: position set of the recorded step entropy: the ``revealed`` tokens, the
            masked positions of the active ``block``, or all ``masked`` positions.
        entropy_reduce: ``mean`` or ``sum`` over that set.
        entropy_temperature: temperature of that entropy.

    Returns:
        :class:`Trajectory` of B sequences, in the order of ``prompts``.

    Raises:
        FloatingPointError: if the model gives NaN logits.
        ValueError: ``generation.steps`` does not fit an int16, or ``generation.cuda_graphs`` is
            asked for without a GPU.
    """
    for block in rollout_blocks(  # noqa: B007 - the last one counts
        denoiser,
        prompts,
        config,
        seed=seed,
        sequence_ids=sequence_ids,
        entropy_over=entropy_over,
        entropy_reduce=entropy_reduce,
        entropy_temperature=entropy_temperature,
    ):
        pass
    return block.trajectory


def rollout_blocks(
    denoiser: Denoiser,
    prompts: PromptBatch,
    config: GenerationConfig,
    *,
    seed: int,
    sequence_ids: Tensor,
    entropy_over: EntropyOver = "revealed",
    entropy_reduce: EntropyReduce = "mean",
    entropy_temperature: float = 1.0,
    complete: bool = False,
    pool: bool = False,
    experts: bool = False,
) -> Iterator[RolloutBlock]:
    """:func:`rollout` block by block, for who takes completions as they come.

    With ``complete`` also the most likely tokens at every step, :attr:`Trajectory.greedy`; with
    ``pool`` mean hidden states, :attr:`Trajectory.pooled`; with ``experts`` those of every token,
    where the model has some and no pass is a CUDA graph.
    """
    recording = Recording(
        seed, entropy_over, entropy_reduce, entropy_temperature, complete, pool, experts
    )
    return _Rollout(denoiser, prompts, config, recording, sequence_ids).blocks()


class _Rollout:
    """All sequences of a rollout, each between two blocks."""

    def __init__(
        self,
        denoiser: Denoiser,
        prompts: PromptBatch,
        config: GenerationConfig,
        recording: Recording,
        sequence_ids: Tensor,
    ) -> None:
        if config.steps + 1 >= NEVER:
            raise ValueError(f"generation.steps must be below {NEVER - 1}, got {config.steps}")
        if config.cuda_graphs:
            check_device(denoiser.device)
        self.denoiser, self.prompts, self.config = denoiser, prompts, config
        self.recording, self.sequence_ids = recording, sequence_ids
        self.decoder = decoder_of(denoiser, config)
        count, length, device = len(prompts), config.max_new_tokens, prompts.ids.device
        dtype = torch.promote_types(denoiser.head_weight.dtype, torch.float32)
        self.tokens = torch.full((count, length), denoiser.mask_id, device=device)
        self.unmask_step = torch.full_like(self.tokens, NEVER, dtype=torch.int16)
        self.confidence = torch.full((count, length), float("nan"), dtype=dtype, device=device)
        self.token_entropy = self.confidence.clone()
        self.num_steps = most_steps(config, denoiser.block_size)
        # A block writes as many as it may take, of which the last one may take fewer.
        most = self.num_steps + config.block_length
        self.entropy = self.confidence.new_full((count, most), float("nan"))
        self.log_prob = torch.zeros_like(self.entropy)
        self.greedy = None
        if recording.complete:
            size = (count, config.steps, length)
            self.greedy = torch.zeros(size, dtype=torch.int32, device=device)
        self.pooled = None
        if recording.pool:
            wide = denoiser.head_weight.shape[1]
            self.pooled = torch.zeros((count, most, wide), dtype=dtype, device=device)
        self.prompt_lengths: list[int] = prompts.mask.sum(1).tolist()
        self.starts = [0] * count
        """First position not denoised, by sequence; where that is in the first block of a
        block-causal model, the first position of the block."""
        self.caches: RunningCaches | None = None
        self.experts: RecordedExperts | None = None
        if isinstance(self.decoder, CausalDecoder):
            self._record_experts(self.decoder, most)
            if recording.entropy_over == "masked":
                raise ValueError(
                    "algorithm.entropy_over: masked needs every masked position in each step, and "
                    "a block-causal model computes one block: choose revealed or block"
                )
            self.starts = [-(n % config.block_length) for n in self.prompt_lengths]
            clean = None if self.experts is None else self.experts.clean
            self.caches = RunningCaches(self.decoder, prompts, length, clean)
        self.steps = [0] * count
        """Steps taken, by sequence."""
        self.queue = sorted(range(count), key=lambda i: -self.prompt_lengths[i])
        """Sequences not begun, the longest prompts first: what comes later fits into a batch."""
        self.running: list[int] = []
        self.batch_size = config.batch_size

    def _record_experts(self, decoder: CausalDecoder, steps: int) -> None:
        """Make room for experts, if they are asked for; a graph does not give any."""
        size = self.denoiser.experts
        if size is None or not self.recording.experts or self.config.cuda_graphs:
            return
        like = torch.empty(size, dtype=torch.int16, device=self.tokens.device)
        count, length = self.tokens.shape
        columns = self.prompts.ids.shape[1] + length
        shape = (count, steps, decoder.block_length)
        self.experts = RecordedExperts.empty(shape, columns, like)
        self.decoder = replace(decoder, record=True)

    @torch.no_grad()
    def blocks(self) -> Iterator[RolloutBlock]:
        """Denoise everything."""
        while self.queue or self.running:
            rows = self.next_batch()
            with self.denoiser.graphed() if self.config.cuda_graphs else nullcontext():
                finished = self.denoise(rows)
            yield RolloutBlock(rows, finished, self)

    def next_batch(self) -> list[int]:
        """The running sequences, and from the queue what fits beside them."""
        rows = self.running[: self.batch_size]
        width = max((self.prompt_lengths[i] for i in rows or self.queue[:1]), default=0)
        allowed = MAX_PADDING * (width + self.config.max_new_tokens)
        while self.queue and len(rows) < self.batch_size:
            if width - self.prompt_lengths[self.queue[0]] > allowed:
                break
            rows.append(self.queue.pop(0))
        self.running = rows + self.running[self.batch_size :]
        return rows

    def denoise(self, rows: list[int]) -> list[int]:
        """Denoise a block of the sequences ``rows`` of :attr:`running`; returns who retired."""
        try:
            block = BlockDenoising(
                self.decoder, self.config, self.recording, self._sequences(rows)
            ).run()
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            self._split(len(rows))
            return []
        finished = self._store(rows, block)
        self.running = [i for i in self.running if i not in finished]
        return finished

    def trajectory(self) -> Trajectory:
        """All sequences as they are now."""
        return Trajectory(
            prompts=self.prompts,
            tokens=self.tokens,
            unmask_step=self.unmask_step,
            confidence=self.confidence,
            token_entropy=self.token_entropy,
            entropy=self.entropy[:, : self.num_steps],
            log_prob=self.log_prob[:, : self.num_steps],
            steps=torch.tensor(self.steps, device=self.tokens.device),
            lengths=length_before(self.tokens, self.denoiser.eos_id),
            mask_id=self.denoiser.mask_id,
            greedy=self.greedy,
            pooled=None if self.pooled is None else self.pooled[:, : self.num_steps],
            experts=None if self.experts is None else self.experts.until(self.num_steps),
        )

    def _sequences(self, rows: list[int]) -> Sequences:
        index = torch.tensor(rows, device=self.tokens.device)
        lengths = [self.prompt_lengths[i] for i in rows]
        if self.caches is not None:
            return Sequences(
                PromptBatch(self.prompts.ids[index], self.prompts.mask[index]),
                True,
                self.tokens[index],
                [self.starts[i] for i in rows],
                self.sequence_ids[index],
                self.caches.of(rows, self.tokens, self.starts, self.queue),
            )
        unused = self.prompts.ids.shape[1] - max(lengths)
        prompts = PromptBatch(self.prompts.ids[index, unused:], self.prompts.mask[index, unused:])
        return Sequences(
            prompts,
            min(lengths) < max(lengths),
            self.tokens[index],
            [self.starts[i] for i in rows],
            self.sequence_ids[index],
        )

    def _split(self, tried: int) -> None:
        """Half as many from now on: nothing of the block was stored, so it is denoised again."""
        self.batch_size = tried // 2
        if self.caches is not None:
            self.caches.clear()
        if self.tokens.is_cuda:
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory denoising %d sequences at a time: going on with %d "
            "(generation.batch_size=%d would begin there)",
            *(tried, self.batch_size, self.batch_size),
        )

    def _store(self, rows: list[int], block: DenoisedBlock) -> list[int]:
        """Write a denoised block; returns the sequences that are done."""
        width, steps = block.tokens.shape[1], block.entropy.shape[1]
        device = self.tokens.device
        index = torch.tensor(rows, device=device)[:, None]
        positions = torch.tensor([self.starts[i] for i in rows], device=device)[:, None]
        positions = positions + torch.arange(width, device=device)
        before = torch.tensor([self.steps[i] for i in rows], device=device)[:, None]
        inside = (positions >= 0) & (positions < self.tokens.shape[1])
        place = index.expand_as(positions)[inside], positions[inside]
        for target, values in (
            (self.tokens, block.tokens),
            (self.unmask_step, (before + block.step).to(torch.int16)),
            (self.confidence, block.confidence),
            (self.token_entropy, block.token_entropy),
        ):
            target[place] = values[inside]
        columns = before + torch.arange(steps, device=device)
        self.entropy[index, columns] = block.entropy
        self.log_prob[index, columns] = block.log_prob
        if self.greedy is not None and block.greedy is not None:
            self.greedy[index, columns] = block.greedy
        if self.pooled is not None and block.pooled is not None:
            self.pooled[index, columns] = block.pooled
        if self.experts is not None and block.experts is not None:
            self.experts.steps[index, columns] = block.experts
            if block.before is not None:
                before = self.prompts.ids.shape[1] + positions - width
                there = before >= 0
                place = index.expand_as(before)[there], before[there]
                self.experts.clean[place] = block.before[there]

        broken = block.token_entropy.isnan() & inside
        ended = ((block.tokens == self.denoiser.eos_id) & inside).any(1)
        for i, taken, nan, eos in zip(
            rows, block.steps, broken.any(1).tolist(), ended.tolist(), strict=True
        ):
            if nan:
                step = self.steps[i] + int(block.step[broken].min())
                raise FloatingPointError(
                    f"the model gave NaN logits at denoising step {step}: its weights or its "
                    "precision are broken"
                )
            self.steps[i] += taken
            self.starts[i] += width
            if eos and self.config.early_exit:
                self.tokens[i, self.starts[i] :] = self.denoiser.eos_id
                self.starts[i] = self.config.max_new_tokens
        return [i for i in rows if self.starts[i] >= self.config.max_new_tokens]


def check_context(
    prompts: Sequence[Sequence[int]], config: GenerationConfig, context: int | None
) -> None:
    """Every prompt and its completion must fit the model's context; names the longest if not."""
    if context is None or not prompts:
        return
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    total = len(prompts[longest]) + config.max_new_tokens
    if total > context:
        raise ValueError(
            f"prompt {longest} has {len(prompts[longest])} tokens and "
            f"generation.max_new_tokens is {config.max_new_tokens}: {total} tokens do not fit the "
            f"model's context of {context}"
        )
