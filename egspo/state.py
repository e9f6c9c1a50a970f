"""Everything a run needs to go on: weights, optimizer, learning-rate schedule, step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from egspo.checkpoint import CheckpointError, save_checkpoint

WEIGHTS, ADAPTER, OPTIMIZER, STATE = "model", "adapter", "optimizer.pt", "state.json"


def save_weights(model: nn.Module, folder: Path) -> Path:
    """Save to, and return, ``folder/adapter`` (PEFT format) or ``folder/model`` (own layout)."""
    target = folder / (ADAPTER if isinstance(model, PeftModel) else WEIGHTS)
    model.save_pretrained(target)  # type: ignore[operator]
    return target


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load in place what :func:`save_weights` wrote; raises CheckpointError if keys differ."""
    if isinstance(model, PeftModel):
        tensors = load_file(folder / ADAPTER / "adapter_model.safetensors")
        outcome: Any = set_peft_model_state_dict(model, tensors)
        unexpected = list(outcome.unexpected_keys)
        missing: list[str] = []
    else:
        tensors = {}
        for file in sorted((folder / WEIGHTS).glob("*.safetensors")):
            tensors.update(load_file(file))
        outcome = model.load_state_dict(tensors, strict=False)
        unexpected, missing = list(outcome.unexpected_keys), list(outcome.missing_keys)
    if unexpected or missing or not tensors:
        raise CheckpointError(
            f"{folder} does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}"
        )


@dataclass(frozen=True)
class TrainingState:
    """The parts of a training run that change. All randomness is counter-based: none to save."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    write_model: Callable[[Path], object]
    """Puts what :func:`save_weights` does, and what goes with it, into a folder."""

    def save(self, folder: Path, step: int, *, keep_last: int) -> Path:
        """Checkpoint after ``step`` under ``folder``."""

        def write(path: Path) -> None:
            self.write_model(path)
            torch.save(
                {
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                },
                path / OPTIMIZER,
            )
            (path / STATE).write_text(json.dumps({"step": step}))

        return save_checkpoint(folder, step, write, keep_last=keep_last)

    def load(self, path: Path) -> int:
        """Restore in place; returns the step."""
        load_weights(self.model, path)
        saved = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        step: int = json.loads((path / STATE).read_text())["step"]
        return step
