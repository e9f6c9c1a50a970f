"""What the launchers of this package share: geometry, alignment, options, the current device."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from egspo_kernels.triton_kernels.tiles import SEGMENT, THREADS

OPTIONS: dict[str, Any] = {"num_warps": THREADS.value // 32, "enable_fp_fusion": True}
"""Launch options of kernels that read rows of logits."""
INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels are made for the interpreter, or for a compiler, when they are imported."""
_SEGMENT_COLUMNS = int(SEGMENT.value)
_HERE = contextlib.nullcontext()


class Launcher:
    """Launches a kernel, and a variant that ran before without asking Triton which one it is.

    Triton reads every argument to find that out, which takes longer than all else that a call does.

    Args:
        kernel: what ``triton.jit`` made.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._variants: dict[Hashable, Any] = {}

    def __call__(
        self, programs: int, variant: Hashable, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Launches ``programs`` programs on the current device.

        Args:
            variant: all that tells one compiled variant from another: device, dtypes, what is
                None, alignments of pointers that the kernel specialises on, and constants.
            arguments: all of the kernel's, in order.
            options: of the launch, where the variant is new.
        """
        compiled = self._variants.get(variant)
        if compiled is not None:
            _launch(compiled, programs, arguments)
            return
        compiled = self.kernel[(programs,)](*arguments, **options)
        # The interpreter has no variants. For AMD a variant depends on the size of memory, too.
        if compiled is not None and compiled.metadata.target.backend == "cuda":
            self._variants[variant] = compiled


def _launch(compiled: Any, programs: int, arguments: tuple[Any, ...]) -> None:
    """``compiled[programs, 1, 1](*arguments)``, without preparing what only hooks would read.

    That takes three times as long. Profilers add hooks, and get what they need.
    """
    hooks = triton.knobs.runtime
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    if getattr(enter, "calls", True) or getattr(leave, "calls", True):
        compiled[programs, 1, 1](*arguments)
        return
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    function, metadata = compiled.function, compiled.packed_metadata
    compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)


def segment_count(vocab_size: int) -> int:
    """Segments of a row: they depend on the vocabulary alone."""
    return -(-vocab_size // _SEGMENT_COLUMNS)


def prepare_logits(logits: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same rows with consecutive columns: a copy of the rows used if they are not already."""
    if logits.stride(1) == 1 or logits.shape[1] == 1:
        return logits, None if rows is None else rows.contiguous()
    return (logits if rows is None else logits[rows.long()]).contiguous(), None


class Layout(NamedTuple):
    """What a variant of a kernel that reads rows in wide loads depends on, beside constants."""

    dtype: torch.dtype
    pointer_aligned: bool
    """Whether the first row starts at a multiple of 16 bytes, which Triton specialises on."""
    align: int
    """The power of two, at most 16, that divides the row stride in elements. A constant of the
    kernel: loads are as wide as the stride allows, and the stride itself need not be constant."""
    aligned: bool
    """Whether every row starts at a multiple of 16 bytes."""


def layout(logits: Tensor) -> Layout:
    pointer, stride = logits.data_ptr() & 15, logits.stride(0)
    unaligned = pointer | stride * logits.element_size() & 15
    return Layout(logits.dtype, not pointer, math.gcd(stride, 16), not unaligned)


def dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    """What a variant depends on where a kernel reads single numbers of a tensor, if any."""
    return None if tensor is None else tensor.dtype


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@functools.cache
def _target(device: int) -> Any:
    """The processor that launches on the current device, which is this one, are compiled for."""
    del device
    return None if INTERPRETED else triton.runtime.driver.active.get_current_target()


@functools.cache
def dependent_launches(device: int) -> bool:
    """Whether a kernel may start while the one before it ends, and wait for it there.

    Args:
        device: number of the current device; -1 for the CPU. So in the functions below.
    """
    target = _target(device)
    return bool(target is not None and target.backend == "cuda" and target.arch >= 90)


@functools.cache
def segment_options(device: int, registers: int | None = None) -> dict[str, Any]:
    """Launch options of the kernels over segments: their threads, and a limit on registers.

    Without a limit the compiler may spend more on paths that are hardly ever taken; it is known to
    NVIDIA's compiler alone. From sm_100 on it would spill, and is left out.
    """
    target = _target(device)
    if target is None:
        return OPTIONS
    options = OPTIONS | {"num_warps": THREADS.value // target.warp_size}
    if registers is not None and target.backend == "cuda" and target.arch < 100:
        options["maxnreg"] = registers
    return options


@functools.cache
def row_options(device: int) -> dict[str, Any]:
    """Launch options of the kernels that combine the segments of a row."""
    options = OPTIONS | {"num_warps": 1}
    return options | {"launch_pdl": True} if dependent_launches(device) else options


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device current: Triton launches there."""
    index = tensor.get_device()
    if index < 0 or index == torch.accelerator.current_device_index():
        return _HERE
    return torch.accelerator.device_index(index)
