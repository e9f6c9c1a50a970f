"""How many rows of logits are alive at once where they are made a chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo_kernels import reference
from egspo_kernels.checks.linear import check_logits_dtype
from egspo_kernels.cpp_kernels.linear import row_bytes as cpp_row_bytes
from egspo_kernels.reference.linear import LIVE_ROWS
from egspo_kernels.shared.product import Settings

DEFAULT_WORKSPACE_BYTES = 256 * 2**20


def linear_settings(
    backend: str,
    operands: tuple[Tensor, Tensor, Tensor | None],
    temperature: float,
    banned_token: int | None,
    workspace_bytes: int,
    logits_dtype: torch.dtype | None,
    *,
    with_reference: bool,
) -> Settings:
    """As many rows to a chunk as the workspace holds, with the temporaries of the backend."""
    weight = operands[1]
    dtype = check_logits_dtype(logits_dtype, weight)
    vocab_size = weight.shape[0]
    if backend == "triton":
        from egspo_kernels.triton_kernels.linear import row_bytes

        trained = any(tensor is not None and tensor.requires_grad for tensor in operands)
        needed = row_bytes(
            vocab_size,
            weight.dtype,
            dtype,
            with_reference=with_reference,
            with_gradient=trained and torch.is_grad_enabled(),
        )
    elif backend == "cpp":
        needed = cpp_row_bytes(vocab_size, weight.dtype, with_reference=with_reference)
    else:
        needed = LIVE_ROWS * reference.accumulation_dtype(weight.dtype).itemsize * vocab_size
    if workspace_bytes < needed:
        raise ValueError(
            f"workspace_bytes must hold one row of logits and its temporaries, {needed} bytes "
            f"for a vocabulary of {vocab_size} with backend {backend!r}, got {workspace_bytes}"
        )
    return Settings(float(temperature), banned_token, workspace_bytes // needed, dtype)
