"""Everything a run needs to go on: weights, optimizer, learning-rate schedule, step."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from egspo.engines.optimization import NonFiniteError
from egspo.engines.whole import Engine
from egspo.files import CheckpointError
from egspo.models.experts import stacked
from egspo.models.lora import POLICY_ADAPTER, save_adapter
from egspo.models.lora_experts import together
from egspo.runs.checkpoint import intact_hint, save_checkpoint
from egspo.training.best import BestSoFar

WEIGHTS, ADAPTER, OPTIMIZER, STATE = "model", "adapter", "optimizer.pt", "state.json"


def save_weights(model: nn.Module, folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
    """Save to, and return, ``folder/adapter`` (PEFT format) or ``folder/model`` (own layout).

    Args:
        model: what is saved.
        folder: where.
        weights: by name, where ``model`` itself has parts of them only.
    """
    target = folder / (ADAPTER if isinstance(model, PeftModel) else WEIGHTS)
    if weights is not None:  # of what is sharded: buffers, such as biases of routers, are whole
        kept = model.state_dict().keys()
        weights = {**{n: b for n, b in model.named_buffers() if n in kept}, **weights}
    if isinstance(model, PeftModel):
        save_adapter(model, target, weights)
    else:
        model.save_pretrained(target, state_dict=weights)  # type: ignore[operator]
    return target


def copy_weights(source: Path, folder: Path) -> None:
    """Put into ``folder`` the model, or adapter, of the checkpoint ``source``."""
    for name in (WEIGHTS, ADAPTER):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load in place what :func:`save_weights` wrote.

    Raises:
        CheckpointError: names or shapes are not those of the model; nothing was loaded.
    """
    if isinstance(model, PeftModel):
        kind = ADAPTER
        expected = get_peft_model_state_dict(model, adapter_name=POLICY_ADAPTER)
    else:
        kind = WEIGHTS
        expected = model.state_dict()
    with _fitting(folder, kind):
        tensors: dict[str, Tensor] = {}
        for file in sorted((folder / kind).glob("*.safetensors")):
            tensors.update(load_file(file))
        tensors = together(stacked(tensors))
        _check_shapes(tensors, expected)
        if isinstance(model, PeftModel):
            set_peft_model_state_dict(model, tensors, adapter_name=POLICY_ADAPTER)
        else:
            model.load_state_dict(tensors, strict=False)


def _check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming what differs."""
    missing, unexpected = sorted(expected.keys() - found), sorted(found.keys() - expected)
    if missing or unexpected or not found:
        raise ValueError(f"missing {missing[:5]}, unexpected {unexpected[:5]}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has the shape {list(found[name].shape)}, the model's is "
                f"{list(tensor.shape)}"
            )


@dataclass(frozen=True)
class TrainingState:
    """The parts of a training run that change. All randomness is counter-based: none to save."""

    command: Literal["train", "sft"]
    """Which of egspo's the run is of; one does not continue the other."""
    model: nn.Module
    engine: Engine
    scheduler: LRScheduler
    write_model: Callable[[Path, dict[str, Tensor] | None], object]
    """Puts what :func:`save_weights` does, and what goes with it, into a folder."""

    def save(
        self,
        folder: Path,
        step: int,
        *,
        keep_last: int,
        keep: int | None = None,
        main: bool = True,
        best: dict[str, Any] | None = None,
    ) -> Path | None:
        """Checkpoint after ``step`` under ``folder``, which the ``main`` one writes and returns.

        Of a sharded engine every process calls this; of another only the main one needs to. What
        ``best`` says is kept with it, for :func:`saved_best`.

        Raises:
            NonFiniteError: a weight is NaN or infinite; the earlier checkpoints are kept.
        """
        weights, optimizer = self.engine.weights(), self.engine.optimizer_state()
        if not main:
            return None
        for name, parameter in self.model.named_parameters():
            value = parameter if weights is None else weights[name]
            if parameter.requires_grad and not bool(value.isfinite().all()):
                raise NonFiniteError(f"after step {step} the weight {name} has NaN or infinity")

        def write(path: Path) -> None:
            self.write_model(path, weights)
            torch.save(
                {"optimizer": optimizer, "scheduler": self.scheduler.state_dict()},
                path / OPTIMIZER,
            )
            (path / STATE).write_text(
                json.dumps({"command": self.command, "step": step, "best": best})
            )

        return save_checkpoint(folder, step, write, keep_last=keep_last, keep=keep)

    def load(self, path: Path) -> None:
        """Restore optimizer and schedule in place; the weights were before they were sharded.

        Raises:
            CheckpointError: they do not fit the model.
        """
        with _fitting(path, OPTIMIZER):
            saved = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
            self._check_moments(saved["optimizer"])
            self.engine.load_optimizer_state(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])

    def _check_moments(self, state: dict[str, Any]) -> None:
        """Of every parameter that is trained, in its shape; of none before the first update."""
        # What DeepSpeed has taken apart says its shape elsewhere.
        shapes = [
            getattr(p, "ds_shape", p.shape) for p in self.model.parameters() if p.requires_grad
        ]
        shapes = [s for s in shapes if len(s) >= 2] + [s for s in shapes if len(s) < 2]
        count = sum(len(group["params"]) for group in state["param_groups"])
        if count != len(shapes):
            raise ValueError(f"it is of {count} parameters, the model trains {len(shapes)}")
        for index, values in state["state"].items():
            moment = values.get("exp_avg")  # 8-bit AdamW has it in blocks, under another name
            if moment is not None and moment.shape != shapes[index]:
                raise ValueError(
                    f"moments of shape {list(moment.shape)} for a weight of {list(shapes[index])}"
                )


_MISFITS = (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError)


@contextmanager
def _fitting(folder: Path, file: str) -> Iterator[None]:
    """Inside, an error of reading ``file`` of a checkpoint says which, and what to go back to."""
    try:
        yield
    except (*_MISFITS, SafetensorError, UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{folder} does not fit this run: {file}: {reason}{intact_hint(folder)}"
        ) from error


def resumed_step(path: Path, command: Literal["train", "sft"], option: str, total: int) -> int:
    """The step of a checkpoint that a run is to go on from.

    Args:
        path: the checkpoint.
        command: of the run.
        option, total: name and value of the option that says how long the run is.

    Raises:
        CheckpointError: it is of another command or a longer run.
    """
    with _fitting(path, STATE):
        state = json.loads((path / STATE).read_text("utf-8"))
        made, step = str(state["command"]), state["step"]
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step is {step!r}")
    if made != command:
        raise CheckpointError(
            f"{path} is a checkpoint of egspo {made}: egspo {command} cannot resume from it"
        )
    if step > total:
        raise CheckpointError(
            f"{path} is of step {step}, later than the last of this run ({option}={total})"
        )
    return step


def saved_best(path: Path) -> BestSoFar | None:
    """What :meth:`TrainingState.save` was told of the best step; None where it was not.

    Raises:
        CheckpointError: it is none.
    """
    with _fitting(path, STATE):
        saved = json.loads((path / STATE).read_text("utf-8")).get("best")
        if saved is None:
            return None
        best = BestSoFar(**saved)
        types = (best.step, int | None), (best.reward, float | int), (best.stale, int)
        if not all(isinstance(value, kind) for value, kind in types):
            raise ValueError(f"best is {saved!r}")
        return best


def trained_bytes(model: nn.Module, copies: int) -> int:
    """Disk that ``copies`` checkpoints take: what is trained and its two moments, in float32."""
    return 12 * copies * sum(p.numel() for p in model.parameters() if p.requires_grad)


class Termination:
    """SIGTERM, as a preempted run gets it: an exit with code 143 that lets the run save first.

    Entered, the signal raises SystemExit at once; with ``deferred`` only a second one does, and
    :attr:`requested` says of the first: for runs that can save between steps only. Only the main
    thread gets signals; entered in another, nothing changes.
    """

    def __init__(self, *, deferred: bool = False) -> None:
        self.deferred, self.requested = deferred, False

    def __enter__(self) -> Termination:
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            self._before = signal.signal(signal.SIGTERM, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        if self._in_main:
            signal.signal(signal.SIGTERM, self._before)

    def _received(self, *_: object) -> None:
        if self.deferred and not self.requested:
            self.requested = True
            return
        raise SystemExit(128 + signal.SIGTERM)
