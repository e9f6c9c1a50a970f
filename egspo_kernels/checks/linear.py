"""Checks shared by the functions that start from hidden states and a head."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo_kernels.checks.arguments import (
    check_banned,
    check_matrix,
    check_temperature,
    check_vector,
)


def check_logits_dtype(logits_dtype: torch.dtype | None, weight: Tensor) -> torch.dtype:
    """The dtype of the logits, by default that of the product."""
    if logits_dtype is None or logits_dtype == weight.dtype:
        return weight.dtype
    if logits_dtype != torch.float32 or weight.dtype == torch.float64:
        raise TypeError(
            f"logits_dtype must be None, {weight.dtype} (the dtype of the product) or a wider "
            f"torch.float32, got {logits_dtype}"
        )
    if weight.device.type != "cuda":
        raise ValueError(
            f"logits_dtype=torch.float32 of {weight.dtype} operands needs a GPU: on "
            f"{weight.device} torch has no such product"
        )
    return logits_dtype


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    banned_token: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks, and the three operands in the dtype of the product."""
    check_matrix("hidden", hidden)
    check_matrix("weight", weight)
    check_temperature(temperature)
    if weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must have shape (V > 0, {hidden.shape[1]}) to match hidden, "
            f"got {tuple(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, hidden on {hidden.device}")
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], hidden.device)
    check_banned(banned_token, weight.shape[0])
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif weight.dtype != hidden.dtype:
        raise TypeError(f"weight must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}")
    elif bias is not None and bias.dtype != hidden.dtype:
        raise TypeError(f"bias must have the dtype of hidden, {hidden.dtype}, got {bias.dtype}")
    return hidden, weight, bias


def check_ref(
    operands: tuple[Tensor, Tensor, Tensor | None],
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Checks, and the reference's hidden states and head, detached, in the dtype of the product.

    Without ``ref_hidden`` the head is returned as it is: nothing uses it.
    """
    hidden, weight, bias = operands
    if ref_hidden is None:
        return None, ref_weight
    _check_like("ref_hidden", ref_hidden, "hidden", hidden)
    return ref_hidden.detach().to(hidden.dtype), _check_ref_weight(weight, ref_weight, bias)


def _check_ref_weight(weight: Tensor, ref_weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if bias is not None and bias.requires_grad:
        raise ValueError("bias is shared with the reference policy: it must be frozen")
    if ref_weight is None:
        if weight.requires_grad:
            raise ValueError("weight is trained: the reference policy needs its own ref_weight")
        return weight
    _check_like("ref_weight", ref_weight, "weight", weight)
    return ref_weight.detach().to(weight.dtype)


def _check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """``tensor`` must be a matrix of the shape of ``other``, on its device."""
    check_matrix(name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} on {other.device}")
