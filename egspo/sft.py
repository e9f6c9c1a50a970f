"""Masked-diffusion supervised training: the warm start of a new model, and ``egspo sft``.

For each sequence a masking rate t is drawn and every completion token is masked with probability
t; the loss is the cross entropy of the masked tokens weighted by 1 / t, an upper bound of the
negative log-likelihood (LLaDA, arXiv 2502.09992). Completions are filled up with EOS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from egspo.config import SFTConfig
from egspo.data_order import data_order
from egspo.denoiser import Denoiser
from egspo.metrics import MetricsWriter
from egspo.optimization import (
    NonFiniteError,
    apply_gradients,
    build_optimizer,
    build_scheduler,
    clip_gradients,
)
from egspo.progress import RunProgress
from egspo.state import TrainingState
from egspo.tasks.base import Example
from egspo.tokenization import encode_prompts
from egspo.trajectory import PromptBatch
from egspo_kernels import counter_uniform, linear_token_stats

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
        """Tokenise; raises ValueError for a missing target, or one longer than ``length``."""
        rows = []
        for number, example in enumerate(examples):
            if example.target is None:
                raise ValueError(f"training example {number} has no target completion")
            tokens = tokenizer(example.target, add_special_tokens=False)["input_ids"]
            if len(tokens) > length:
                raise ValueError(
                    f"the target of training example {number} has {len(tokens)} tokens, "
                    f"generation.max_new_tokens is {length}"
                )
            rows.append(tokens + [denoiser.eos_id] * (length - len(tokens)))
        encoded = encode_prompts(tokenizer, [example.prompt for example in examples])
        prompts = PromptBatch.from_lists(encoded, denoiser.pad_id, denoiser.device)
        return cls(prompts, torch.tensor(rows, device=denoiser.device))

    def batch(self, seed: int, step: int, size: int) -> SupervisedData:
        """The ``step``-th batch of a fresh permutation every epoch."""
        order = data_order(seed, self.completions.shape[0], step * size, size)
        index = torch.tensor(order, device=self.completions.device)
        prompts = PromptBatch(self.prompts.ids[index], self.prompts.mask[index])
        return SupervisedData(prompts, self.completions[index])


def supervised_loss(denoiser: Denoiser, data: SupervisedData, seed: int, step: int) -> Tensor:
    """Masked-diffusion loss of one batch, in nats per completion token; differentiable."""
    size, length = data.completions.shape
    rows = torch.arange(size, device=data.completions.device)
    # Stratified over the batch: one rate in each of `size` equal parts of (0, 1).
    offset = counter_uniform(seed ^ _RATE_STREAM, step % 2**32, rows[:1], 1)[0, 0]
    rate = ((offset + rows) / size).remainder(1.0).clamp(min=_MIN_RATE)
    noise = counter_uniform(seed ^ _MASK_STREAM, step % 2**32, rows, length)
    masked = noise < rate[:, None]
    canvas = data.completions.masked_fill(masked, denoiser.mask_id)
    prompt_mask = data.prompts.mask
    attention = torch.nn.functional.pad(prompt_mask, (0, length), value=True)
    with denoiser.autocast():
        hidden = denoiser.hidden_states(
            torch.cat([data.prompts.ids, canvas], dim=1),
            None if bool(prompt_mask.all()) else attention,
        )
        stats = linear_token_stats(
            hidden[:, -length:][masked],
            denoiser.head_weight,
            data.completions[masked],
            bias=denoiser.head_bias,
            banned_token=denoiser.mask_id,
        )
    assert stats.log_prob is not None
    weight = (1.0 / rate)[:, None].expand_as(masked)[masked]
    return -(stats.log_prob * weight).sum() / (size * length)


def train_supervised(
    denoiser: Denoiser,
    data: SupervisedData,
    config: SFTConfig,
    folder: Path,
    *,
    write_model: Callable[[Path], object],
    resume: Path | None = None,
    checkpoint_every: int = 0,
    keep_last: int = 1,
) -> None:
    """Train the model of ``denoiser`` in place; metrics and checkpoints go to ``folder``.

    ``write_model`` saves the model, and what goes with it, into a folder.

    Raises:
        NonFiniteError: on a NaN or infinite loss or gradient, before the weights take it.
    """
    model = denoiser.model
    optimizer = build_optimizer(model, config.optimizer)
    scheduler = build_scheduler(optimizer, config.optimizer, config.steps)
    state = TrainingState(model, optimizer, scheduler, write_model)
    start = state.load(resume) if resume is not None else 0
    writer = MetricsWriter(folder / "sft_metrics.jsonl", resume_after=start if resume else None)
    model.train()
    with RunProgress(config.steps, "supervised warm start", start=start) as progress:
        for step in range(start + 1, config.steps + 1):
            # Dropout, where there is any, draws from torch's generator: make it the step's own.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed * 1_000_003 + step)
                batch = data.batch(config.seed, step - 1, config.batch_size)
                loss = supervised_loss(denoiser, batch, config.seed, step)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteError(f"the supervised loss is {value} at step {step}")
            loss.backward()  # type: ignore[no-untyped-call]
            norm = clip_gradients(model, config.optimizer.max_grad_norm)
            apply_gradients(optimizer)
            scheduler.step()
            if step % config.log_every == 0 or step == config.steps:
                rate = optimizer.param_groups[0]["lr"]
                writer.write({"step": step, "loss": value, "grad_norm": norm, "lr": rate})
            progress.update(step, {"loss": value})
            if checkpoint_every and step % checkpoint_every == 0:
                state.save(folder / "checkpoints", step, keep_last=keep_last)
    model.eval()
