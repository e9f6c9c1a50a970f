"""The K highest-entropy steps of every trajectory.

Order, the same in every backend: by entropy, highest first; equal entropies by earlier step; NaN
after every number, NaNs among themselves by earlier step. -0 equals +0. A row with fewer than K
candidates ends in -1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from egspo_kernels.checks.arguments import (
    check_index,
    check_integer,
    check_matrix,
    may_read_values,
)
from egspo_kernels.dispatch import extension
from egspo_kernels.dispatch.backend import Dispatcher, always_available, cpp_probe
from egspo_kernels.reference import selection as reference

_REDUCTIONS = {"sum": 0, "mean": 1}  # EGSPO_REDUCE_* in csrc/select_steps.h
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}
_CPP_STEPS = {dtype: f"egspo_select_steps_{suffix}" for dtype, suffix in _SUFFIXES.items()}
_CUDA_MOST = 2**31 - 1  # EGSPO_CUDA_MOST in csrc/select_steps_cuda.h


def _probe_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "runs on CUDA tensors only"
    return extension.cuda_device_lacks(device.index)


_CANDIDATES = {"cuda": _probe_cuda, "cpp": cpp_probe, "reference": always_available}
_SELECT_STEPS = Dispatcher("select_steps", _CANDIDATES)
_SELECT_STEPS_SEGMENTED = Dispatcher("select_steps_segmented", _CANDIDATES)


def select_steps(
    entropy: Tensor, k: int, *, limits: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Indices of the ``k`` highest entropies of each row, highest first.

    Args:
        entropy: float32 or float64 [B, T], nats. Not differentiated through.
        k: how many steps to select, in [0, T].
        limits: integer [B] in [0, T]; only the steps in [0, limit) of a row are candidates. None:
            every step. On a GPU the range is not checked, as reading it would synchronise: limits
            beyond it act as 0 or T.
        backend: ``"auto"``, ``"cuda"`` or ``"cpp"`` (tensors on a GPU or on the CPU; compiled), or
            ``"reference"`` (PyTorch).

    Returns:
        int64 [B, k] on the device of ``entropy``, -1 where a row has too few candidates.

    Raises:
        TypeError: an argument has the wrong type, or ``entropy`` has 16 bits.
        ValueError: an argument has the wrong shape, device or range.
        UnavailableBackendError: an explicit backend cannot run.
    """
    _check_entropy("entropy", entropy)
    _check_k(k, entropy.shape[1])
    if limits is not None:
        check_index("limits", limits, entropy.shape[0], entropy.device, entropy.shape[1] + 1)
    if torch.compiler.is_compiling():
        selected: Tensor = _select_steps_operator(entropy.detach(), k, limits, backend)
        return selected
    return _select_steps(entropy, k, limits, backend)


def select_steps_segmented(
    token_entropy: Tensor,
    step_ids: Tensor,
    num_steps: int,
    k: int,
    *,
    reduce: str = "mean",
    limits: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`select_steps` on per-token entropies, reduced to one entropy per step.

    Sums are taken in float64. Steps without a token are not candidates.

    Args:
        token_entropy: float32 or float64 [B, L], nats. Not differentiated through.
        step_ids: integer [B, L], the step in [0, ``num_steps``) each token belongs to, or -1 for
            a token to ignore. On a GPU the range is not checked: other ids are ignored too.
        num_steps: T, the number of steps.
        k: how many steps to select, in [0, T].
        reduce: ``"mean"`` or ``"sum"`` over the tokens of a step.
        limits: integer [B] in [0, T], as for :func:`select_steps`.
        backend: ``"auto"``, ``"cuda"`` or ``"cpp"`` (tensors on a GPU or on the CPU; compiled), or
            ``"reference"`` (PyTorch).

    Returns:
        int64 [B, k] on the device of ``token_entropy``, -1 where a row has too few candidates.

    Raises:
        TypeError: an argument has the wrong type, or ``token_entropy`` has 16 bits.
        ValueError: an argument has the wrong shape, device or range.
        UnavailableBackendError: an explicit backend cannot run.
    """
    _check_entropy("token_entropy", token_entropy)
    _check_count("num_steps", num_steps)
    _check_k(k, num_steps)
    _check_step_ids(step_ids, token_entropy, num_steps)
    if reduce not in _REDUCTIONS:
        raise ValueError(f"reduce must be one of {tuple(_REDUCTIONS)}, got {reduce!r}")
    if limits is not None:
        check_index("limits", limits, len(token_entropy), token_entropy.device, num_steps + 1)
    arguments = (step_ids, num_steps, k, reduce, limits, backend)
    if torch.compiler.is_compiling():
        selected: Tensor = _select_segmented_operator(token_entropy.detach(), *arguments)
        return selected
    return _select_segmented(token_entropy, *arguments)


# The two functions below are what runs, in eager mode directly and under torch.compile as the
# operators made of them: dispatch is inside, so that tracing meets none of it.


def _select_steps(entropy: Tensor, k: int, limits: Tensor | None, backend: str) -> Tensor:
    batch, steps = entropy.shape
    limits = None if limits is None else limits.long().contiguous()
    chosen = _SELECT_STEPS.choose(backend, entropy.device, _refused(batch, steps))
    if chosen == "reference":
        return reference.select_steps(entropy, reference.within(entropy, limits), k)
    values, (row_stride, column_stride) = entropy, entropy.stride()
    if column_stride != 1:
        values = entropy.contiguous()
        row_stride = values.stride(0)
    selected = values.new_empty(batch, k, dtype=torch.int64)
    if chosen == "cuda":
        shape = (batch, steps, row_stride)
        _call_compiled(chosen, "select_steps", values, *shape, limits, k, selected)
        return selected
    address = None if limits is None else limits.data_ptr()
    arguments = (values.data_ptr(), batch, steps, row_stride, address, k, selected.data_ptr())
    extension.call_plain(extension.cpu_library(), _CPP_STEPS[values.dtype], arguments)
    return selected


def _select_segmented(
    token_entropy: Tensor,
    step_ids: Tensor,
    num_steps: int,
    k: int,
    reduce: str,
    limits: Tensor | None,
    backend: str,
) -> Tensor:
    batch, tokens = token_entropy.shape
    step_ids = step_ids.long()
    limits = None if limits is None else limits.long()
    refused = _refused(batch, num_steps)
    chosen = _SELECT_STEPS_SEGMENTED.choose(backend, token_entropy.device, refused)
    if chosen == "reference":
        entropy, has_token = reference.step_entropy(token_entropy, step_ids, num_steps, reduce)
        return reference.select_steps(entropy, reference.within(entropy, limits) & has_token, k)
    values = _contiguous_rows(token_entropy)
    selected = values.new_empty(batch, k, dtype=torch.int64)
    workspace = []
    if chosen == "cuda":  # of each step the sum and the number of tokens, 8 bytes each
        workspace.append(values.new_empty(batch, num_steps, 2, dtype=torch.float64))
    _call_compiled(
        chosen,
        "select_steps_segmented",
        values,
        step_ids.contiguous(),
        batch,
        tokens,
        values.stride(0),
        num_steps,
        _REDUCTIONS[reduce],
        _contiguous(limits),
        k,
        selected,
        *workspace,
    )
    return selected


_select_steps_operator = custom_op("egspo::select_steps", _select_steps, mutates_args=())
_select_segmented_operator = custom_op(
    "egspo::select_steps_segmented", _select_segmented, mutates_args=()
)


@_select_steps_operator.register_fake
def _(entropy: Tensor, k: int, limits: Tensor | None, backend: str) -> Tensor:
    del limits, backend
    return entropy.new_empty(entropy.shape[0], k, dtype=torch.int64)


@_select_segmented_operator.register_fake
def _(
    token_entropy: Tensor,
    step_ids: Tensor,
    num_steps: int,
    k: int,
    reduce: str,
    limits: Tensor | None,
    backend: str,
) -> Tensor:
    del step_ids, num_steps, reduce, limits, backend
    return token_entropy.new_empty(token_entropy.shape[0], k, dtype=torch.int64)


def _call_compiled(backend: str, function: str, values: Tensor, *arguments: object) -> None:
    suffix = _SUFFIXES[values.dtype]
    if backend == "cuda":
        name = f"egspo_cuda_{function}_{suffix}"
        extension.call_cuda(name, values.device, values, *arguments)
    else:
        extension.call(f"egspo_{function}_{suffix}", values, *arguments)


def _refused(batch: int, steps: int) -> dict[str, str]:
    if batch <= _CUDA_MOST and steps <= _CUDA_MOST:
        return {}
    return {"cuda": f"more than {_CUDA_MOST} rows or steps"}


def _contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _check_entropy(name: str, tensor: Tensor) -> None:
    check_matrix(name, tensor)
    if tensor.dtype not in _SUFFIXES:
        raise TypeError(
            f"{name} must be float32 or float64, got {tensor.dtype}: rounded to 16 bits, entropies "
            "change about one in eight choices of the top 8; compute them in float32"
        )


def _check_count(name: str, value: int) -> None:
    check_integer(name, value)
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def _check_k(k: int, steps: int) -> None:
    _check_count("k", k)
    if k > steps:
        raise ValueError(f"k must be at most the number of steps, {steps}, got {k}")


def _check_step_ids(step_ids: Tensor, token_entropy: Tensor, num_steps: int) -> None:
    if not isinstance(step_ids, Tensor):
        raise TypeError(f"step_ids must be a tensor, got {type(step_ids).__name__}")
    if step_ids.dtype not in (torch.int64, torch.int32, torch.int16):
        raise TypeError(f"step_ids must be int64, int32 or int16, got {step_ids.dtype}")
    if step_ids.shape != token_entropy.shape:
        raise ValueError(
            f"step_ids must have the shape of token_entropy, {tuple(token_entropy.shape)}, "
            f"got {tuple(step_ids.shape)}"
        )
    if step_ids.device != token_entropy.device:
        raise ValueError(f"step_ids is on {step_ids.device}, expected {token_entropy.device}")
    if step_ids.numel() and may_read_values(step_ids):
        low, high = map(int, step_ids.aminmax())
        if low < -1 or high >= num_steps:
            raise ValueError(
                f"step_ids must lie in [-1, {num_steps}), got values in [{low}, {high}]"
            )
