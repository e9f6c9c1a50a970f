"""Calls of the library: statistics, samples, divergence and gradient of rows of logits."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from egspo_kernels.dispatch import extension
from egspo_kernels.types import SampledTokens, TokenStats

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # in csrc/rows.h


class _Rows(ctypes.Structure):
    """``egspo_rows`` of csrc/rows.h."""

    _fields_ = (
        ("parallel", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("banned", ctypes.c_int64),
        ("temperature", ctypes.c_double),
    )


class _Gradients(ctypes.Structure):
    """``egspo_row_gradients`` of csrc/rows.h."""

    _fields_ = (
        ("targets", ctypes.c_void_p),
        ("maximum", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("reference", ctypes.c_void_p),
        ("reference_maximum", ctypes.c_void_p),
        ("mean_difference", ctypes.c_void_p),
        ("grad_logsumexp", ctypes.c_void_p),
        ("grad_entropy", ctypes.c_void_p),
        ("grad_log_prob", ctypes.c_void_p),
        ("grad_kl", ctypes.c_void_p),
    )


class Normaliser(NamedTuple):
    """``p(x) = e^((x - maximum) / temperature) / total``; float32 [N] each."""

    maximum: Tensor
    total: Tensor


class Divergence(NamedTuple):
    """What the gradient of the exact KL takes; float32 [N] each."""

    ref_maximum: Tensor
    mean_difference: Tensor


class Coefficients(NamedTuple):
    """Gradient of the loss with respect to each statistic, float32 [N]; None where it has none."""

    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    log_prob: Tensor | None = None
    kl: Tensor | None = None


@functools.cache
def _parallel() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime of torch, whose threads then serve here.

    None where there is no such runtime (macOS): the library starts threads of its own.
    """
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def _rows(logits: Tensor, temperature: float, banned_token: int | None) -> _Rows:
    """Of logits with consecutive columns, which must live until the call is over."""
    rows, vocab_size = logits.shape
    return _Rows(
        _parallel(),
        torch.get_num_threads(),
        logits.data_ptr(),
        _DTYPES[logits.dtype],
        rows,
        vocab_size,
        logits.stride(0),
        -1 if banned_token is None else banned_token,
        temperature,
    )


def _consecutive(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _index(values: Tensor) -> Tensor:
    return values.long().contiguous()


def _floats(logits: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=logits.device)


def token_stats(
    logits: Tensor,
    targets: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    banned_token: int | None,
    normaliser: Normaliser | None = None,
) -> TokenStats:
    """As :func:`egspo_kernels.token_stats`, of checked arguments.

    Args:
        normaliser: written too, if given.
    """
    logits = _consecutive(logits)
    count = logits.shape[0] if rows is None else rows.numel()
    stats = TokenStats(
        _floats(logits, count),
        _floats(logits, count),
        None if targets is None else _floats(logits, count),
        torch.empty(count, dtype=torch.int64, device=logits.device),
        _floats(logits, count),
    )
    extension.call(
        "egspo_token_stats",
        ctypes.byref(_rows(logits, temperature, banned_token)),
        None if rows is None else _index(rows),
        count,
        None if targets is None else _index(targets),
        *stats,
        *(normaliser or (None, None)),
    )
    return stats


def sample_tokens(
    logits: Tensor,
    temperature: float,
    seed: int,
    step: int,
    row_ids: Tensor,
    banned_token: int | None,
    entropy_temperature: float,
) -> SampledTokens:
    """As :func:`egspo_kernels.sample_tokens`, of checked arguments; ``seed`` is signed."""
    logits = _consecutive(logits)
    count = logits.shape[0]
    sampled = SampledTokens(
        torch.empty(count, dtype=torch.int64, device=logits.device),
        *(_floats(logits, count) for _ in range(3)),
    )
    extension.call(
        "egspo_sample_tokens",
        ctypes.byref(_rows(logits, temperature, banned_token)),
        row_ids.contiguous(),
        seed,
        step,
        entropy_temperature,
        *sampled,
    )
    return sampled


def log_probs(
    logits: Tensor, targets: Tensor, temperature: float, banned_token: int | None
) -> tuple[Tensor, Normaliser]:
    """Log-probability of the targets, and what the gradient needs."""
    normaliser = Normaliser(*(_floats(logits, logits.shape[0]) for _ in range(2)))
    stats = token_stats(logits, targets, None, temperature, banned_token, normaliser)
    assert stats.log_prob is not None
    return stats.log_prob, normaliser


def divergence(
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: float,
    banned_token: int | None,
) -> tuple[Tensor, Tensor, Normaliser, Divergence]:
    """Log-probability of the targets and exact KL, float32 [N], and what their gradient needs."""
    logits, ref_logits = _consecutive(logits), _consecutive(ref_logits)
    outputs = [_floats(logits, logits.shape[0]) for _ in range(6)]
    extension.call(
        "egspo_row_divergence",
        ctypes.byref(_rows(logits, temperature, banned_token)),
        ctypes.byref(_rows(ref_logits, temperature, banned_token)),
        _index(targets),
        *outputs,
    )
    return outputs[0], outputs[1], Normaliser(*outputs[2:4]), Divergence(*outputs[4:])


def row_gradient(
    logits: Tensor,
    normaliser: Normaliser,
    coefficients: Coefficients,
    temperature: float,
    banned_token: int | None,
    *,
    targets: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logits: Tensor | None = None,
    divergence: Divergence | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the logits, in their dtype; written to ``out`` if given.

    Args:
        out: consecutive columns; may be ``logits``.
    """
    logits = _consecutive(logits)
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    reference = None
    if coefficients.kl is not None:
        assert ref_logits is not None and divergence is not None
        ref_logits = _consecutive(ref_logits)
        reference = _rows(ref_logits, temperature, banned_token)
    vectors = {name: None if v is None else v.contiguous() for name, v in _named(coefficients)}
    held = {
        "targets": None if targets is None else _index(targets),
        "maximum": normaliser.maximum,
        "total": normaliser.total,
        "entropy": entropy,
        **(divergence._asdict() if divergence is not None and reference is not None else {}),
        **vectors,
    }
    held["reference_maximum"] = held.pop("ref_maximum", None)
    of = _Gradients(**{name: None if v is None else v.data_ptr() for name, v in held.items()})
    of.reference = None if reference is None else ctypes.addressof(reference)
    arguments = (ctypes.byref(_rows(logits, temperature, banned_token)), ctypes.byref(of))
    extension.call("egspo_row_gradient", *arguments, out, out.stride(0))
    return out


def _named(coefficients: Coefficients) -> list[tuple[str, Tensor | None]]:
    return [(f"grad_{name}", value) for name, value in coefficients._asdict().items()]
