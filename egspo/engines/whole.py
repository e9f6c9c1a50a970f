"""How a model is trained on several processes: what every engine does, and the simplest one.

An engine owns the gradient, its clipping, the update and the optimizer's state. What it saves does
not say which engine it was: whole tensors, in the order of the parameters, so that a run may go on
with another engine or another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from egspo.engines.optimization import apply_gradients, clip_gradients
from egspo.engines.processes import Processes


class Engine(Protocol):
    """The weights in training; the methods are called by all processes in the same order."""

    name: str
    sharded: bool
    """Whether a process has a part of the weights only, so that passes are collective."""
    optimizer: torch.optim.Optimizer

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, whole weights in every process, gathered once: passes without gradients are not
        collective there, so that processes may do unequal work."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradient. A sharded engine needs as many calls of every process.

        Args:
            loss: scalar.
            last: whether it is the last one before :meth:`reduce_gradients`.
        """

    def reduce_gradients(self, has_gradient: bool) -> bool:
        """Average over processes; False if none has any, and there is nothing to step on.

        Every process calls this once per optimizer step, whatever work it had, so that unequal
        work cannot hang.
        """

    def clip(self, max_grad_norm: float) -> float:
        """Clip the gradient; returns its norm before, over all processes.

        Raises:
            NonFiniteError: the norm is not finite.
        """

    def step(self) -> None:
        """Update, and clear the gradient."""

    def weights(self) -> dict[str, Tensor] | None:
        """Whole weights by name, on the CPU, in the main process; None where the model has them."""

    def optimizer_state(self) -> dict[str, Any]:
        """As of ``torch.optim``, of whole tensors; complete in the main process."""

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`optimizer_state` of any engine gave."""


class TorchUpdate:
    """What torch does alike for whole weights and for parts of them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, max_grad_norm: float) -> float:
        return clip_gradients(self.model, max_grad_norm)

    def step(self) -> None:
        apply_gradients(self.optimizer)


class WholeModel(TorchUpdate):
    """Every process has the whole model; gradients are averaged before every update."""

    name, sharded = "replicated", False

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        processes: Processes,
    ) -> None:
        self.model, self.processes = model, processes
        self.optimizer = make_optimizer(model)

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce_gradients(self, has_gradient: bool) -> bool:
        if self.processes.count == 1:
            return has_gradient
        if not self.processes.any(has_gradient):
            return False
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                gradient = torch.zeros_like(parameter) if gradient is None else gradient
                dist.all_reduce(gradient)
                parameter.grad = gradient.div_(self.processes.count)
        return True

    def weights(self) -> dict[str, Tensor] | None:
        return None

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
