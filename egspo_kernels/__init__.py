"""Kernels of EGSPO: softmax statistics, sampling, the stepwise surrogate and step selection.

Every function takes ``backend="auto"`` or an explicit backend; :func:`available_backends` says
which can run here and why others cannot, :func:`last_backend` which one ran.
"""

from egspo_kernels.dispatch.backend import UnavailableBackendError, available_backends, last_backend
from egspo_kernels.linear import linear_stepwise_surrogate, linear_token_stats
from egspo_kernels.random import counter_gumbel, counter_uniform
from egspo_kernels.selection import select_steps, select_steps_segmented
from egspo_kernels.stats import sample_tokens, token_stats
from egspo_kernels.surrogate import aggregate_steps, stepwise_surrogate
from egspo_kernels.types import SampledTokens, Surrogate, TokenStats
from egspo_kernels.vocab_parallel import (
    vocab_parallel_stepwise_surrogate,
    vocab_parallel_token_stats,
)

__all__ = [
    "SampledTokens",
    "Surrogate",
    "TokenStats",
    "UnavailableBackendError",
    "aggregate_steps",
    "available_backends",
    "counter_gumbel",
    "counter_uniform",
    "last_backend",
    "linear_stepwise_surrogate",
    "linear_token_stats",
    "sample_tokens",
    "select_steps",
    "select_steps_segmented",
    "stepwise_surrogate",
    "token_stats",
    "vocab_parallel_stepwise_surrogate",
    "vocab_parallel_token_stats",
]
