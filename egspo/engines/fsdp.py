"""FSDP2: every process keeps a part of the weights, gradients and optimizer state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from egspo.engines.processes import Processes
from egspo.engines.whole import TorchUpdate


class ShardedModel(TorchUpdate):
    """Sharded by ``torch.distributed.fsdp.fully_shard``, block by block.

    Args:
        model: whole, the same in every process; sharded in place.
        make_optimizer: makes the optimizer of the sharded model.
        reference: a frozen copy, sharded alike.
        device_type: of the processes' device.
        reshard: free a block's whole weights after its forward pass, and gather them again for the
            backward pass. Without, an update holds all of the whole weights.
        offload: keep the parts in host memory between passes.
        reference_head: keep the embeddings and head of the reference whole, for the exact KL.

    Gradients are reduced after every micro-batch, so that no process holds a whole gradient.
    """

    name, sharded = "fsdp2", True

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        processes: Processes,
        *,
        device_type: str,
        reference: nn.Module | None = None,
        reshard: bool = True,
        offload: bool = False,
        reference_head: bool = False,
    ) -> None:
        self.model, self.processes, self._reshard = model, processes, reshard
        mesh = init_device_mesh(device_type, (processes.count,))
        policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        # Beside its output a block returns keys and values, which nothing changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        self._blocks: list[FSDPModule] = []
        self._rest: list[FSDPModule] = []  # embeddings, last norm and head
        for whole in (model, reference):
            if whole is None:
                continue
            for block in blocks(whole):
                self._blocks.append(
                    fully_shard(
                        block, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy
                    )
                )
            # Needed from the first to the last layer, and by the loss.
            self._rest.append(
                fully_shard(whole, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
            )
        self._stays_whole = self._rest[1:] if reference_head else []
        self.optimizer = make_optimizer(model)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        parts = [*self._blocks, *self._rest]
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for part in self._blocks:
                part.set_reshard_after_forward(self._reshard, recurse=False)
            for part in parts:
                if part not in self._stays_whole:
                    part.reshard()

    def reduce_gradients(self, has_gradient: bool) -> bool:
        return self.processes.any(has_gradient)

    def weights(self) -> dict[str, Tensor] | None:
        whole = {}
        for name, parameter in self.model.named_parameters():
            tensor = _whole(parameter.detach())  # one at a time: a process holds one more at most
            if self.processes.is_main:
                whole[name] = tensor.cpu()
        return whole

    def optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        whole: dict[int, dict[str, Any]] = {}
        for index, values in state["state"].items():
            gathered = {name: _whole(value) for name, value in values.items()}
            if self.processes.is_main:
                whole[index] = {
                    k: v.cpu() if isinstance(v, Tensor) else v for k, v in gathered.items()
                }
        return {**state, "state": whole}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        parts = {
            index: {name: _part(value, parameters[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": parts})


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, by the names that transformers' models say of themselves."""
    base = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    names = set(base._no_split_modules or [])
    found = [module for module in base.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(f"{type(base).__name__} names no blocks to shard (_no_split_modules)")
    return found


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _part(value: Any, parameter: nn.Parameter) -> Any:
    """``value`` laid out as ``parameter`` is, where it is of the same shape."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    assert isinstance(parameter, DTensor)
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
