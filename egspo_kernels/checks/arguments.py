"""Argument checks shared by the public functions.

Checks that read tensor *values* would synchronise a GPU: they always run on CPU tensors and run on
GPU tensors only with ``EGSPO_KERNELS_DEBUG=1``. Under ``torch.compile`` there is nothing to read.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def may_read_values(tensor: Tensor) -> bool:
    """Whether value checks on ``tensor`` are allowed (they would synchronise a GPU)."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("EGSPO_KERNELS_DEBUG", "0") == "1"


def check_matrix(name: str, tensor: Tensor) -> None:
    """``tensor`` must be a floating-point matrix."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_vector(name: str, tensor: Tensor, length: int, device: torch.device) -> None:
    """``tensor`` must be a vector of ``length`` elements on ``device``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_index(name: str, tensor: Tensor, length: int, device: torch.device, upper: int) -> None:
    """``tensor`` must be an integer vector of ``length`` values in [0, ``upper``)."""
    check_vector(name, tensor, length, device)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}")
    if length and may_read_values(tensor):
        low, high = map(int, tensor.aminmax())
        if low < 0 or high >= upper:
            raise ValueError(f"{name} must lie in [0, {upper}), got values in [{low}, {high}]")


def check_integer(name: str, value: int) -> None:
    """``value`` must be an integer: neither a float that looks like one nor a truth value."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")


def check_number(name: str, value: float) -> None:
    """``value`` must be a number, not a truth value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")


def check_temperature(
    temperature: float, *, allow_zero: bool = False, name: str = "temperature"
) -> None:
    """``temperature`` must be a positive finite number (or zero, where greedy is meaningful)."""
    check_number(name, temperature)
    valid = temperature > 0 or (allow_zero and temperature == 0)
    if not valid or temperature == float("inf"):
        bound = ">= 0" if allow_zero else "> 0"
        raise ValueError(f"{name} must be finite and {bound}, got {temperature}")


def check_row_ids(row_ids: Tensor, length: int, device: torch.device) -> None:
    """``row_ids`` must be an int64 vector: any value is a row's identity."""
    check_vector("row_ids", row_ids, length, device)
    if row_ids.dtype != torch.int64:
        raise TypeError(f"row_ids must be int64, got {row_ids.dtype}")


def check_step(step: int) -> None:
    """``step`` must be a 32-bit counter."""
    check_integer("step", step)
    if not 0 <= step < 2**32:
        raise ValueError(f"step must lie in [0, 2**32), got {step}")


def check_banned(banned_token: int | None, vocab_size: int) -> None:
    """``banned_token`` must be a token id, and must leave something to choose from."""
    if banned_token is None:
        return
    check_integer("banned_token", banned_token)
    if not 0 <= banned_token < vocab_size:
        raise ValueError(f"banned_token must lie in [0, {vocab_size}), got {banned_token}")
    if vocab_size == 1:
        raise ValueError("banned_token bans the only token of the vocabulary")


def refuse_float64(*tensors: Tensor | None) -> dict[str, str]:
    """The backends that compute in float32: whether they are refused, and why."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            why = "it computes in float32, and the input is float64"
            return {"triton": why, "cpp": why}
    return {}


def refuse_tracing() -> dict[str, str]:
    """Whether backends that torch.compile cannot trace are refused, and why.

    It compiles the reference itself where that serves.
    """
    if torch.compiler.is_compiling():
        return {"cpp": "torch.compile cannot trace it, and compiles the reference instead"}
    return {}
