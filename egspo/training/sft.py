"""Masked-diffusion supervised training: the warm start of a new model, and ``egspo sft``.

For each sequence a masking rate t is drawn and every completion token is masked with probability
t; the loss is the cross entropy of the masked tokens weighted by 1 / t, an upper bound of the
negative log-likelihood (LLaDA, arXiv 2502.09992). Completions are filled up with EOS.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from egspo.config import CheckpointConfig, SFTConfig
from egspo.engines import WholeModel
from egspo.engines.optimization import (
    NonFiniteError,
    advance,
    build_optimizer,
    build_scheduler,
    clip_gradients,
)
from egspo.engines.processes import Processes
from egspo.models.loading import seeded
from egspo.models.tokenization import encode_prompts, end_of_turn
from egspo.rollouts.causal import CausalDecoder
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import PromptBatch, block_starts
from egspo.runs.checkpoint import CHECKPOINTS, remove_later
from egspo.runs.lock import RunLockedError
from egspo.runs.metrics import MetricsWriter
from egspo.tasks.base import Example
from egspo.training.data_order import data_order
from egspo.training.progress import RunProgress
from egspo.training.state import Termination, TrainingState, load_weights, resumed_step
from egspo_kernels import counter_uniform, linear_token_stats

logger = logging.getLogger("egspo")

_METRICS = "sft_metrics.jsonl"
_MIN_RATE = 1e-3
_RATE_STREAM, _MASK_STREAM = 0x72617465, 0x6D61736B


@dataclass(frozen=True)
class SupervisedData:
    """N prompts and their completions, filled up with EOS to one length."""

    prompts: PromptBatch
    completions: Tensor
    """int64 [N, L]."""

    @classmethod
    def encode(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        length: int,
        denoiser: Denoiser,
    ) -> SupervisedData:
        """Tokenise; raises ValueError for a missing target, or one longer than ``length``.

        Behind a target stands the end of turn of the chat template, where there is room.
        """
        end = end_of_turn(tokenizer)
        filler = [] if end is None or end == denoiser.eos_id else [end]
        filler += [denoiser.eos_id] * length
        targets = encode_targets(tokenizer, examples, length)
        rows = [(tokens + filler)[:length] for tokens in targets]
        encoded = encode_prompts(tokenizer, [example.prompt for example in examples])
        prompts = PromptBatch.from_lists(encoded, denoiser.pad_id, denoiser.device)
        return cls(prompts, torch.tensor(rows, device=denoiser.device))

    def batch(self, seed: int, step: int, size: int) -> SupervisedData:
        """The ``step``-th batch of a fresh permutation every epoch."""
        order = data_order(seed, self.completions.shape[0], step * size, size)
        index = torch.tensor(order, device=self.completions.device)
        prompts = PromptBatch(self.prompts.ids[index], self.prompts.mask[index])
        return SupervisedData(prompts, self.completions[index])


def encode_targets(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], length: int
) -> list[list[int]]:
    """Tokens of the reference completions.

    Raises:
        ValueError: an example has none, or one that is longer than ``length`` or has the mask
            token; names it.
    """
    rows = []
    for number, example in enumerate(examples):
        if example.target is None:
            raise ValueError(f"training example {number} has no target completion")
        tokens: list[int] = tokenizer(example.target, add_special_tokens=False)["input_ids"]
        if len(tokens) > length:
            raise ValueError(
                f"the target of training example {number} has {len(tokens)} tokens, "
                f"generation.max_new_tokens is {length}"
            )
        if tokenizer.mask_token_id is not None and tokenizer.mask_token_id in tokens:
            raise ValueError(
                f"the target of training example {number} spells the mask token "
                f"{tokenizer.mask_token!r}, which no model writes: its loss would be infinite"
            )
        rows.append(tokens)
    return rows


def supervised_loss(denoiser: Denoiser, data: SupervisedData, seed: int, step: int) -> Tensor:
    """Masked-diffusion loss of one batch, in nats per completion token; differentiable.

    With a block-causal model every block is masked at a rate of its own and predicted behind the
    clean blocks before it, all in one pass: the bound of block diffusion (arXiv 2503.09573).
    """
    size, length = data.completions.shape
    rows = torch.arange(size, device=data.completions.device)
    noise = counter_uniform(seed ^ _MASK_STREAM, step % 2**32, rows, length)
    block_of, starts = _blocks(denoiser, data)
    rate = masking_rates(seed, step, size, len(starts), rows.device)
    rate = rate.gather(1, block_of)
    masked = noise < rate
    canvas = data.completions.masked_fill(masked, denoiser.mask_id)
    with denoiser.autocast():
        if denoiser.block_size is None:
            hidden = _whole(denoiser, data, canvas)[masked]
        else:
            hidden = _by_block(denoiser, data, canvas, starts)[masked]
        stats = linear_token_stats(
            hidden,
            denoiser.head_weight,
            data.completions[masked],
            bias=denoiser.head_bias,
            banned_token=denoiser.mask_id,
        )
    assert stats.log_prob is not None
    return -(stats.log_prob * (1.0 / rate)[masked]).sum() / (size * length)


def masking_rates(seed: int, step: int, size: int, blocks: int, device: torch.device) -> Tensor:
    """[size, blocks] masking rates, one in each of so many equal parts of (0, 1)."""
    number = torch.arange(size * blocks, device=device)
    offset = counter_uniform(seed ^ _RATE_STREAM, step % 2**32, number[:1], 1)[0, 0]
    rate = ((offset + number) / len(number)).remainder(1.0).clamp(min=_MIN_RATE)
    return rate.view(blocks, size).t()  # those of a sequence lie far apart


def _blocks(denoiser: Denoiser, data: SupervisedData) -> tuple[Tensor, list[Tensor]]:
    """Block of every position int64 [B, L], and starts int64 [B] of the blocks.

    With full attention all is one block.
    """
    size, length = data.completions.shape
    position = torch.arange(length, device=data.completions.device).expand(size, -1)
    if denoiser.block_size is None:
        return torch.zeros_like(position), [position[:, 0]]
    prompt = data.prompts.mask.sum(1)
    first = block_starts(position[:, 0], prompt, denoiser.block_size)
    block_of = (position - first[:, None]) // denoiser.block_size
    count = int(block_of.max()) + 1
    return block_of, [first + n * denoiser.block_size for n in range(count)]


def _whole(denoiser: Denoiser, data: SupervisedData, canvas: Tensor) -> Tensor:
    """Hidden states [B, L, D] of completions by full attention."""
    mask, length = data.prompts.mask, canvas.shape[1]
    attention = torch.nn.functional.pad(mask, (0, length), value=True)
    ids = torch.cat([data.prompts.ids, canvas], dim=1)
    return denoiser.hidden_states(ids, None if bool(mask.all()) else attention)[:, -length:]


def _by_block(
    denoiser: Denoiser, data: SupervisedData, canvas: Tensor, starts: list[Tensor]
) -> Tensor:
    """Hidden states [B, L, D], each block behind the clean ones before it."""
    assert denoiser.block_size is not None
    size, length = canvas.shape
    decoder = CausalDecoder(denoiser, denoiser.block_size)
    place = torch.arange(size, device=canvas.device).repeat(len(starts))
    start = torch.cat(starts)
    there = (start < length).nonzero()[:, 0]  # where a completion has one block fewer
    place, start = place[there], start[there]
    window, _ = decoder.states(data.prompts, data.completions, place, start, canvas[place])
    positions = start[:, None] + torch.arange(denoiser.block_size, device=canvas.device)
    state, offset = ((positions >= 0) & (positions < length)).nonzero(as_tuple=True)
    hidden = window.hidden.new_zeros(size, length, window.hidden.shape[2])
    return hidden.index_put((place[state], positions[state, offset]), window.hidden[state, offset])


def train_supervised(
    denoiser: Denoiser,
    data: SupervisedData,
    config: SFTConfig,
    folder: Path,
    *,
    write_model: Callable[[Path, dict[str, Tensor] | None], object],
    resume: Path | None = None,
    checkpoint: CheckpointConfig | None = None,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Train the model of ``denoiser`` in place; metrics and checkpoints go to ``folder``.

    Args:
        write_model: saves the model, and what goes with it, into a folder, as
            :func:`egspo.training.warm_start.save_model`.
        resume: a checkpoint to go on from.
        checkpoint: when to save, besides at the end and before an error or interrupt ends the run;
            None never saves.
        check: raises where ``folder`` must not be written to any more.

    Raises:
        CheckpointError: ``resume`` is not of this kind, or of a later step than ``config.steps``.
        NonFiniteError: on a NaN or infinite loss or gradient, before the weights take it.
    """
    model = denoiser.model
    start = 0
    if resume is not None:
        start = resumed_step(resume, "sft", "sft.steps", config.steps)
        load_weights(model, resume)
    engine = WholeModel(
        model, lambda model: build_optimizer(model, config.optimizer), Processes(alone=True)
    )
    scheduler = build_scheduler(engine.optimizer, config.optimizer, config.steps)
    state = TrainingState("sft", model, engine, scheduler, write_model)
    if resume is not None:
        state.load(resume)
        remove_later(folder / CHECKPOINTS, start)
    writer = MetricsWriter(
        folder / _METRICS,
        resume_after=start if resume else None,
        history=resume and resume.parent.parent / _METRICS,
    )
    writer.warn_of_missing(range(config.log_every, start + 1, config.log_every))

    def save(step: int) -> None:
        if checkpoint is not None and step:
            check()
            state.save(folder / CHECKPOINTS, step, keep_last=checkpoint.keep_last)

    completed, intact = start, True
    model.train()
    try:
        with (
            RunProgress(config.steps, "supervised training", start=start) as progress,
            Termination(),
        ):
            for step in range(start + 1, config.steps + 1):
                value, norm = _gradients(denoiser, data, config, step)
                rate = scheduler.get_last_lr()[0]
                intact = False  # until all of the step is done, the state belongs to none
                engine.step()
                advance(scheduler)
                if step % config.log_every == 0 or step == config.steps:
                    check()
                    writer.write({"step": step, "loss": value, "grad_norm": norm, "lr": rate})
                completed, intact = step, True
                progress.update(step, {"loss": value})
                if checkpoint is not None and checkpoint.every and step % checkpoint.every == 0:
                    save(step)
    except BaseException:
        if intact:
            try:
                save(completed)
            except (OSError, NonFiniteError, RunLockedError) as error:  # must not hide the cause
                logger.error("step %d could not be saved: %s", completed, error)
        raise
    save(completed)
    model.eval()


def _gradients(
    denoiser: Denoiser, data: SupervisedData, config: SFTConfig, step: int
) -> tuple[float, float]:
    """Loss of the step, and the norm of its gradient, which is left in the model, clipped."""
    # Dropout, where there is any, draws from torch's generator: make it the step's own.
    with seeded(config.seed * 1_000_003 + step, denoiser.device):
        batch = data.batch(config.seed, step - 1, config.batch_size)
        loss = supervised_loss(denoiser, batch, config.seed, step)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the supervised loss is {value} at step {step}; the weights did not take it"
        )
    loss.backward()  # type: ignore[no-untyped-call]
    return value, clip_gradients(denoiser.model, config.optimizer.max_grad_norm)
