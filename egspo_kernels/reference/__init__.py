"""Plain PyTorch versions of the kernels: short, differentiable, and the oracle of the tests."""

from egspo_kernels.reference.rows import sample_tokens, token_stats
from egspo_kernels.reference.softmax import (
    accumulation_dtype,
    entropy_of,
    gather_last,
    log_softmax,
    tempered,
)
from egspo_kernels.reference.surrogate import stepwise_surrogate

__all__ = [
    "accumulation_dtype",
    "entropy_of",
    "gather_last",
    "log_softmax",
    "sample_tokens",
    "stepwise_surrogate",
    "tempered",
    "token_stats",
]
