"""Everything a run needs to go on: weights, optimizer, learning-rate schedule, step."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from egspo.checkpoint import CheckpointError, save_checkpoint
from egspo.models.lora import POLICY_ADAPTER
from egspo.optimization import NonFiniteError

WEIGHTS, ADAPTER, OPTIMIZER, STATE = "model", "adapter", "optimizer.pt", "state.json"


def save_weights(model: nn.Module, folder: Path) -> Path:
    """Save to, and return, ``folder/adapter`` (PEFT format) or ``folder/model`` (own layout)."""
    target = folder / (ADAPTER if isinstance(model, PeftModel) else WEIGHTS)
    # Of an adapter's model only the one that was trained, so that the folder is a plain adapter.
    chosen = {"selected_adapters": [POLICY_ADAPTER]} if isinstance(model, PeftModel) else {}
    model.save_pretrained(target, **chosen)  # type: ignore[operator]
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

    command: Literal["train", "sft"]
    """Which of egspo's the run is of; one does not continue the other."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    write_model: Callable[[Path], object]
    """Puts what :func:`save_weights` does, and what goes with it, into a folder."""

    def save(self, folder: Path, step: int, *, keep_last: int, keep: int | None = None) -> Path:
        """Checkpoint after ``step`` under ``folder``.

        Raises:
            NonFiniteError: a weight is NaN or infinite; the earlier checkpoints are kept.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise NonFiniteError(f"after step {step} the weight {name} has NaN or infinity")

        def write(path: Path) -> None:
            self.write_model(path)
            torch.save(
                {
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                },
                path / OPTIMIZER,
            )
            (path / STATE).write_text(json.dumps({"command": self.command, "step": step}))

        return save_checkpoint(folder, step, write, keep_last=keep_last, keep=keep)

    def load(self, path: Path, option: str, total_steps: int) -> int:
        """Restore in place; returns the step.

        Args:
            path: the checkpoint.
            option, total_steps: name and value of the option that says how long the run is.

        Raises:
            CheckpointError: it is of another command, model or longer run.
        """
        state = json.loads((path / STATE).read_text())
        if state["command"] != self.command:
            raise CheckpointError(
                f"{path} is a checkpoint of egspo {state['command']}: egspo {self.command} cannot "
                "resume from it"
            )
        if state["step"] > total_steps:
            raise CheckpointError(
                f"{path} is of step {state['step']}, later than the last of this run "
                f"({option}={total_steps})"
            )
        load_weights(self.model, path)
        saved = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        step: int = state["step"]
        return step


def trained_bytes(model: nn.Module, copies: int) -> int:
    """Disk that ``copies`` checkpoints take: what is trained and its two moments, in float32."""
    return 12 * copies * sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextmanager
def termination_raises() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit, so that a preempted run can save first.

    Only in the main thread, which alone gets signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
