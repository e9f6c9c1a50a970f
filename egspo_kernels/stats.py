"""Softmax statistics and sampling from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo_kernels import reference
from egspo_kernels._backend import Dispatcher, always_available
from egspo_kernels._checks import (
    check_banned,
    check_index,
    check_matrix,
    check_temperature,
    check_vector,
)
from egspo_kernels.types import SampledTokens, TokenStats

_TOKEN_STATS = Dispatcher("token_stats", {"reference": always_available})
_SAMPLE_TOKENS = Dispatcher("sample_tokens", {"reference": always_available})


@torch.no_grad()
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

    Args:
        logits: floating point [M, V].
        targets: integer [N] token ids in [0, V), or None.
        rows: integer [N], which rows of ``logits`` to use, in this order; None for all (N = M).
        temperature: softmax temperature, > 0. Every statistic is at this temperature.
        banned_token: token id excluded from the normaliser, the entropy and the argmax; its own
            log-probability is -inf.
        backend: ``"auto"`` or a backend name, see :func:`egspo_kernels.available_backends`.

    Returns:
        :class:`TokenStats` of [N] tensors. A row without a finite logit, or with a NaN, is NaN.

    Raises:
        ValueError, TypeError: on a bad argument, named in the message.
        UnavailableBackendError: if an explicit backend cannot run.
    """
    check_matrix("logits", logits)
    check_temperature(temperature)
    check_banned(banned_token, logits.shape[1])
    if rows is not None:
        check_index("rows", rows, rows.numel(), logits.device, logits.shape[0])
        logits = logits[rows.long()]
    if targets is not None:
        check_index("targets", targets, logits.shape[0], logits.device, logits.shape[1])
    _check_vocabulary(logits)
    _TOKEN_STATS.choose(backend, logits.device)
    return reference.token_stats(logits, targets, temperature, banned_token)


@torch.no_grad()
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
    """Gumbel-max sample of every row, with its log-probability, confidence and entropy.

    The noise is a function of (seed, step, row id) alone, drawn in float32: what a row samples
    does not depend on the batch it is in, nor on the precision of the logits.

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
        :class:`SampledTokens` of [N] tensors.
    """
    check_matrix("logits", logits)
    check_temperature(temperature, allow_zero=True)
    check_temperature(entropy_temperature)
    check_banned(banned_token, logits.shape[1])
    check_vector("row_ids", row_ids, logits.shape[0], logits.device)
    _check_vocabulary(logits)
    _SAMPLE_TOKENS.choose(backend, logits.device)
    return reference.sample_tokens(
        logits, temperature, seed, step, row_ids, banned_token, entropy_temperature
    )


def _check_vocabulary(logits: Tensor) -> None:
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have at least one column, got shape {tuple(logits.shape)}")
