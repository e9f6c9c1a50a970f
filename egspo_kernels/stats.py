"""Softmax statistics and sampling from logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from egspo_kernels import reference
from egspo_kernels.checks.arguments import (
    check_banned,
    check_index,
    check_integer,
    check_matrix,
    check_row_ids,
    check_step,
    check_temperature,
    refuse_float64,
)
from egspo_kernels.cpp_kernels import rows as cpp_rows
from egspo_kernels.dispatch.backend import Dispatcher, always_available, cpp_probe, triton_probe
from egspo_kernels.types import SampledTokens, TokenStats

_BACKENDS = {"triton": triton_probe, "cpp": cpp_probe, "reference": always_available}
_TOKEN_STATS = Dispatcher("token_stats", _BACKENDS)
_SAMPLE_TOKENS = Dispatcher("sample_tokens", _BACKENDS)


def token_stats(
    logits: Tensor,
    targets: Tensor | None,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    banned_token: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Log-normaliser, entropy, target log-probability, argmax and its probability of each row.

    Forward only; :func:`egspo_kernels.linear_token_stats` is the differentiable form.

    The triton backend reads float32, float16 and bfloat16 logits once, at any row stride (columns
    that are not consecutive are copied first), and a row's result does not depend on the batch.

    Args:
        logits: floating point [M, V].
        targets: integer [N] token ids in [0, V), or None.
        rows: integer [N], which rows of ``logits`` to use, in this order; None for all (N = M).
            Indices are not checked on a GPU; there the triton backend gives NaN for one out of
            range.
        temperature: softmax temperature, > 0. Every statistic is at this temperature.
        banned_token: token id excluded from the normaliser, the entropy and the argmax; its own
            log-probability is -inf.
        backend: ``"auto"`` or a backend name, see :func:`egspo_kernels.available_backends`.

    Returns:
        :class:`TokenStats` of [N] tensors. A row with a NaN or +inf logit, or without a finite one,
        is NaN (its ``logsumexp`` may be infinite) and its ``argmax`` is some token.

    Raises:
        ValueError, TypeError: on a bad argument, named in the message.
        UnavailableBackendError: if an explicit backend cannot run.
    """
    check_matrix("logits", logits)
    check_temperature(temperature)
    check_banned(banned_token, logits.shape[1])
    _check_vocabulary(logits)
    if rows is not None:
        check_index("rows", rows, rows.numel(), logits.device, logits.shape[0])
    count = logits.shape[0] if rows is None else rows.numel()
    if targets is not None:
        check_index("targets", targets, count, logits.device, logits.shape[1])
    arguments = (targets, rows, temperature, banned_token, backend)
    if torch.compiler.is_compiling():
        outputs = _token_stats_operator(logits.detach(), *arguments)
    else:
        outputs = _token_stats(logits, *arguments)
    logsumexp, entropy, log_prob, argmax, confidence = outputs
    return TokenStats(logsumexp, entropy, None if targets is None else log_prob, argmax, confidence)


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float,
    seed: int,
    step: int,
    row_ids: Tensor,
    banned_token: int | None = None,
    entropy_temperature: float = 1.0,
    backend: str = "auto",
) -> SampledTokens:
    """A sample of every row, with its log-probability, confidence and entropy.

    Drawn in two levels, a block of 128 columns and then a token of that block, exact in
    distribution (:mod:`egspo_kernels.reference.sampling` has the definition). The noise is a
    function of (seed, step, row id) alone, drawn in float32: what a row samples does not depend on
    the batch it is in, nor on the precision of the logits. Tokens are the same in every backend
    but for ties within rounding; the compiled ones read float32, float16 and bfloat16 logits once.

    Args:
        logits: floating point [N, V].
        temperature: sampling temperature; 0 is greedy (lowest id among ties).
        seed: 64-bit key of the noise.
        step: denoising step, in [0, 2**32).
        row_ids: int64 [N], absolute identity of each row.
        banned_token: token id that is never sampled and is left out of every normaliser.
        entropy_temperature: temperature of the reported entropy, > 0.
        backend: ``"auto"`` or a backend name.

    Returns:
        :class:`SampledTokens` of [N] tensors. A row with a NaN or +inf logit, or without a finite
        one, has NaN statistics and some token.

    Raises:
        ValueError, TypeError: on a bad argument, named in the message.
        UnavailableBackendError: if an explicit backend cannot run.
    """
    check_matrix("logits", logits)
    check_temperature(temperature, allow_zero=True)
    check_temperature(entropy_temperature, name="entropy_temperature")
    check_integer("seed", seed)
    check_banned(banned_token, logits.shape[1])
    check_row_ids(row_ids, logits.shape[0], logits.device)
    check_step(step)
    _check_vocabulary(logits)
    key = (seed & 2**64 - 1 ^ 1 << 63) - (1 << 63)  # an operator takes a signed integer
    arguments = (
        float(temperature),
        key,
        step,
        row_ids,
        banned_token,
        float(entropy_temperature),
        backend,
    )
    if torch.compiler.is_compiling():
        return SampledTokens(*_sample_tokens_operator(logits.detach(), *arguments))
    return SampledTokens(*_sample_tokens(logits, *arguments))


def _check_vocabulary(logits: Tensor) -> None:
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have at least one column, got shape {tuple(logits.shape)}")


# The two functions below are what runs, in eager mode directly and under torch.compile as the
# operators made of them: dispatch is inside, so that tracing meets none of it.


def _token_stats(
    logits: Tensor,
    targets: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    banned_token: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chosen = _TOKEN_STATS.choose(backend, logits.device, refuse_float64(logits))
    if chosen == "triton":
        from egspo_kernels.triton_kernels import rows as kernels

        stats = kernels.token_stats(logits, targets, rows, temperature, banned_token)
    elif chosen == "cpp":
        stats = cpp_rows.token_stats(logits, targets, rows, temperature, banned_token)
    else:
        picked = logits.detach() if rows is None else logits.detach()[rows.long()]
        stats = reference.token_stats(picked, targets, temperature, banned_token)
    log_prob = logits.new_empty(0) if stats.log_prob is None else stats.log_prob
    return stats.logsumexp, stats.entropy, log_prob, stats.argmax, stats.confidence


def _sample_tokens(
    logits: Tensor,
    temperature: float,
    seed: int,
    step: int,
    row_ids: Tensor,
    banned_token: int | None,
    entropy_temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = _SAMPLE_TOKENS.choose(backend, logits.device, refuse_float64(logits))
    arguments = (temperature, seed, step, row_ids, banned_token, entropy_temperature)
    if chosen == "triton":
        from egspo_kernels.triton_kernels import sampling

        return sampling.sample_tokens(logits, *arguments)
    if chosen == "cpp":
        return cpp_rows.sample_tokens(logits, *arguments)
    return reference.sample_tokens(logits.detach(), *arguments)


_token_stats_operator = custom_op("egspo::token_stats", _token_stats, mutates_args=())
_sample_tokens_operator = custom_op("egspo::sample_tokens", _sample_tokens, mutates_args=())


@_token_stats_operator.register_fake
def _(
    logits: Tensor,
    targets: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    banned_token: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del temperature, banned_token, backend
    count = logits.shape[0] if rows is None else rows.shape[0]
    dtype = reference.accumulation_dtype(logits.dtype)
    logsumexp, entropy, log_prob, confidence = (
        logits.new_empty(count, dtype=dtype) for _ in range(4)
    )
    if targets is None:
        log_prob = logits.new_empty(0)
    return logsumexp, entropy, log_prob, logits.new_empty(count, dtype=torch.int64), confidence


@_sample_tokens_operator.register_fake
def _(
    logits: Tensor,
    temperature: float,
    seed: int,
    step: int,
    row_ids: Tensor,
    banned_token: int | None,
    entropy_temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del temperature, seed, step, row_ids, banned_token, entropy_temperature, backend
    dtype = reference.accumulation_dtype(logits.dtype)
    log_prob, confidence, entropy = (
        logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(3)
    )
    return logits.new_empty(logits.shape[0], dtype=torch.int64), log_prob, confidence, entropy
