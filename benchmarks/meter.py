"""Seconds, FLOPs and memory of the phases of a piece of work."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.weak import WeakIdKeyDictionary

Mode = Literal["time", "memory", "count"]


@dataclass
class PhaseCost:
    """What a phase took; 0 where it was not measured."""

    seconds: float = 0.0
    flops: int = 0
    peak_bytes: int = 0
    """Most bytes of tensors alive in the phase, without those from before the meter began: the
    model's weights. A new optimizer's state counts."""


@dataclass
class Meter:
    """Measures phases: ``time``, without any counting in the way; ``memory``; or ``count``, memory
    and FLOPs.

    Memory is what the caching allocator gave out on a GPU, in every mode; on a CPU, but for
    ``time``, the tensors that operators returned and that are still alive. Their inner buffers are
    not seen.
    """

    device: torch.device
    mode: Mode
    clock: Callable[[], float] = time.perf_counter
    """``time.process_time`` for a CPU that others use too."""
    phases: dict[str, PhaseCost] = field(default_factory=dict)
    _live: LiveBytes | None = None
    _held: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around all phases."""
        on_gpu = self.device.type == "cuda"
        self._held = torch.cuda.memory_allocated(self.device) if on_gpu else 0
        self._live = None if on_gpu or self.mode == "time" else LiveBytes()
        with self._live or nullcontext():
            yield
        self._live = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One phase; several of one name add up, the largest peak counts."""
        cost = self.phases.setdefault(name, PhaseCost())
        if self._live is not None:
            self._live.peak = self._live.now
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        counter = flop_counter() if self.mode == "count" else None
        start = self.clock()
        with counter or nullcontext():
            yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) - self._held
            cost.peak_bytes = max(cost.peak_bytes, peak)
        if self.mode == "time":
            cost.seconds += self.clock() - start
        if counter is not None:
            cost.flops += counter.get_total_flops()
        if self._live is not None:
            cost.peak_bytes = max(cost.peak_bytes, self._live.peak)


def merged(timed: dict[str, PhaseCost], counted: dict[str, PhaseCost]) -> dict[str, PhaseCost]:
    """Seconds of one run, FLOPs of another, the larger memory of both."""
    return {
        name: PhaseCost(
            timed[name].seconds,
            counted[name].flops,
            max(timed[name].peak_bytes, counted[name].peak_bytes),
        )
        for name in timed
    }


def flop_counter() -> FlopCounterMode:
    """Torch's counter, which does not know the fused attention of CPUs."""

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators made inside and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # What comes in and is not known was there before: it is not counted.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.setdefault(tensor.untyped_storage(), True)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, size: int) -> None:
        self.now -= size
