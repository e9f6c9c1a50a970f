"""Optimizer, learning-rate schedule and the guarded update that both trainers share."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from egspo.config import OptimizerConfig
from egspo.models.quantization import optimizer_class


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; the weights were not touched by it."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, of which matrices decay and vectors (norms, biases) do
    not; or SGD with momentum.

    Raises:
        ValueError: nothing is trainable, or ``optimizer.name`` is not possible here.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters")
    if config.name == "sgd":
        return torch.optim.SGD(trainable, lr=config.learning_rate, momentum=config.betas[0])
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    make: Any = optimizer_class(config, trainable[0].device)
    optimizer: torch.optim.Optimizer = make(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
    )
    return optimizer


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int
) -> LRScheduler:
    """Schedule over training steps (an RL iteration is one step, however many updates it makes)."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps
    )
    return scheduler


def advance(scheduler: LRScheduler) -> None:
    """On to the next training step; that a step made no update is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        scheduler.step()


def clip_gradients(model: nn.Module, max_grad_norm: float) -> float:
    """Clip the gradient in place; returns the norm before clipping.

    Raises:
        NonFiniteError: if the norm is not finite.
    """
    trainable = [p for p in model.parameters() if p.grad is not None]
    total = nn.utils.clip_grad_norm_(trainable, max_grad_norm)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if not math.isfinite(norm):
        raise NonFiniteError(f"the gradient norm is {norm}; the weights did not take it")
    return norm


def apply_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Step and clear the gradients."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
