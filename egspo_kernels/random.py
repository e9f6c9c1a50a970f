"""Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC 2011) in tensor operations.

A number is a pure function of (seed, step, row id, column): no generator state exists, so a row's
noise does not depend on the batch it is in, on the device, or on what was drawn before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egspo_kernels.checks.arguments import check_step

_LOW32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

BLOCK_COUNTERS = 2**31
"""Counter of the first four blocks of a vocabulary; those of its columns lie below 2**29."""


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of two 32-bit numbers held in int64."""
    product = b * a  # wraps modulo 2**64: the bits are right, only the sign is not meant
    return (product >> 32) & _LOW32, product & _LOW32


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """Philox 4x32-10.

    Args:
        seed: key, its low 64 bits are used.
        c0, c1, c2, c3: int64, broadcastable, the four counter words, each in [0, 2**32).

    Returns:
        int64 [..., 4]: four random words in [0, 2**32) for each counter.
    """
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    shape = (c0 | c1 | c2 | c3).shape
    return torch.stack([word.expand(shape) for word in (c0, c1, c2, c3)], dim=-1)


def counter_uniform(seed: int, step: int, row_ids: Tensor, columns: int) -> Tensor:
    """Uniform numbers in (0, 1), one row for each row id.

    Args:
        seed: key of the stream.
        step: counter in [0, 2**32), for example the denoising step.
        row_ids: int64 [N], absolute identity of each row.
        columns: numbers for each row.

    Returns:
        float32 [N, columns]. Full 32-bit resolution near 0, never 0 and never 1.
    """
    return _uniform(seed, step, row_ids, columns, 0)


def counter_gumbel(seed: int, step: int, row_ids: Tensor, columns: int) -> Tensor:
    """Standard Gumbel noise, float32 [N, columns]; arguments as :func:`counter_uniform`.

    ``-log(-log1p(-u))`` keeps the large values, which decide the maximum, at full resolution: they
    come from ``u`` near 0, where float32 is finest.
    """
    return -torch.log(counter_exponential(seed, step, row_ids, columns))


def counter_exponential(
    seed: int, step: int, row_ids: Tensor, columns: int, first_group: Tensor | int = 0
) -> Tensor:
    """Standard exponential noise, float32 [N, columns]; the smallest values at full resolution.

    Args:
        seed, step, row_ids, columns: as :func:`counter_uniform`.
        first_group: counter of the first four columns, int64 [N] or one for all rows. Column ``c``
            of a row is word ``c % 4`` of the counter ``first_group + c // 4``.
    """
    return -torch.log1p(-_uniform(seed, step, row_ids, columns, first_group))


def _uniform(
    seed: int, step: int, row_ids: Tensor, columns: int, first_group: Tensor | int
) -> Tensor:
    check_step(step)
    if row_ids.ndim != 1 or row_ids.dtype != torch.int64:
        raise ValueError(
            f"row_ids must be an int64 vector, got {row_ids.dtype} {tuple(row_ids.shape)}"
        )
    groups = torch.arange(-(-columns // 4), device=row_ids.device)[None, :]
    groups = groups + (first_group[:, None] if isinstance(first_group, Tensor) else first_group)
    low, high = (row_ids & _LOW32)[:, None], ((row_ids >> 32) & _LOW32)[:, None]
    words = philox(seed, groups, low, high, torch.full_like(low, step))
    uniform = (words.flatten(1)[:, :columns].double() + 0.5) * 2.0**-32
    return uniform.float().clamp_(max=1 - 2.0**-24)
