"""Activation offload: what the backward pass waits for, kept in the memory of the host."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SMALLEST_BYTES = 64 << 10
"""What is smaller stays: masks, rotary tables and statistics, most of them shared by all layers."""


@dataclass(frozen=True)
class _Saved:
    """A tensor that autograd saved, as a view of bytes that were moved."""

    bytes: Tensor
    """uint8, on the host."""
    device: torch.device
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]


class ActivationOffload:
    """Moves what autograd saves to host memory, and back when the backward pass comes to it.

    Loss and gradients stay the same to the bit: values, strides and shapes do. Whole storages are
    moved, each once, however many operators save a view of it; so the host holds as many bytes as
    the device would have. To and from a GPU they go by pinned memory and in the stream of the pass,
    for which the host does not wait. Parameters stay where they are, and so does what is small.

    Args:
        parameters: of the model, which must stay where they are.
        smallest: bytes; what is smaller stays.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, smallest: int = SMALLEST_BYTES
    ) -> None:
        self._own = {p.untyped_storage().data_ptr() for p in parameters}
        self.smallest = smallest
        self._moved: dict[int, dict[int, Tensor]] = {}
        """Bytes on the host of storages that are still alive, by version."""
        self.storages = 0
        """That were moved so far."""
        self.bytes = 0
        """That were moved so far."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, what autograd saves is moved."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.smallest or self._is_weight(tensor):
            return tensor
        key = id(storage)
        if key not in self._moved:
            self._moved[key] = {}
            weakref.finalize(storage, self._moved.pop, key, None)
        versions = self._moved[key]
        if tensor._version not in versions:
            versions[tensor._version] = _to_host(storage, tensor.device)
            self.storages += 1
            self.bytes += storage.nbytes()
        return _Saved(
            versions[tensor._version],
            tensor.device,
            tensor.dtype,
            int(tensor.storage_offset()),
            tensor.shape,
            tensor.stride(),
        )

    def _is_weight(self, tensor: Tensor) -> bool:
        """Or a view of one. Those that a sharded engine gathers are nowhere twice the same."""
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return True
        return tensor.untyped_storage().data_ptr() in self._own

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        storage = _to_device(saved.bytes, saved.device).untyped_storage()
        tensor = torch.empty(0, dtype=saved.dtype, device=saved.device)
        return tensor.set_(storage, saved.offset, saved.shape, saved.strides)


def _to_host(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    """A copy of the bytes of ``storage``, uint8 [n]."""
    on_device = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    pinned = device.type == "cuda"
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
    return host.copy_(on_device, non_blocking=pinned)


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(host, device=device).copy_(host, non_blocking=host.is_pinned())
