"""What the launchers of this package share: geometry, alignment, options, the current device."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from egspo_kernels.triton_kernels.tiles import SEGMENT, THREADS

OPTIONS: dict[str, Any] = {"num_warps": THREADS.value // 32, "enable_fp_fusion": True}
"""Launch options of kernels that read rows of logits."""


def segment_count(vocab_size: int) -> int:
    """Segments of a row: they depend on the vocabulary alone."""
    return -(-vocab_size // int(SEGMENT.value))


def prepare_logits(logits: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same rows with consecutive columns: a copy of the rows used if they are not already."""
    if logits.stride(1) == 1 or logits.shape[1] == 1:
        return logits, None if rows is None else rows.contiguous()
    return (logits if rows is None else logits[rows.long()]).contiguous(), None


def alignment(logits: Tensor) -> int:
    """The power of two, at most 16, that divides the row stride in elements.

    A constant of the compiled kernel: with it loads are as wide as the stride allows, and the
    stride itself need not be constant.
    """
    return math.gcd(logits.stride(0), 16)


def is_aligned(logits: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    return not (logits.data_ptr() | logits.stride(0) * logits.element_size()) & 15


def dependent_launches() -> bool:
    """Whether a kernel may start while the one before it ends, and wait for it there."""
    if triton.knobs.runtime.interpret:
        return False
    return _dependent_launches(triton.runtime.driver.active.get_current_target())


@functools.lru_cache(maxsize=16)
def _dependent_launches(target: Any) -> bool:
    return bool(target.backend == "cuda" and target.arch >= 90)


def segment_options(registers: int | None = None) -> dict[str, Any]:
    """Launch options of the kernels over segments: their threads, and a limit on registers.

    Without a limit the compiler may spend more on paths that are hardly ever taken; it is known to
    NVIDIA's compiler alone. From sm_100 on it would spill, and is left out.
    """
    if triton.knobs.runtime.interpret:
        return OPTIONS
    return _segment_options(triton.runtime.driver.active.get_current_target(), registers)


@functools.lru_cache(maxsize=64)
def _segment_options(target: Any, registers: int | None) -> dict[str, Any]:
    options = OPTIONS | {"num_warps": THREADS.value // target.warp_size}
    if registers is not None and target.backend == "cuda" and target.arch < 100:
        options["maxnreg"] = registers
    return options


def row_options(dependent: bool) -> dict[str, Any]:
    """Launch options of the kernels that combine the segments of a row."""
    options = OPTIONS | {"num_warps": 1}
    return options | {"launch_pdl": True} if dependent else options


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device current: Triton launches there."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.accelerator.device_index(tensor.device.index)
