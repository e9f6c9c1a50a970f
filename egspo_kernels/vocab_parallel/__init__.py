"""A head whose rows are spread over ranks."""

from egspo_kernels.vocab_parallel.functions import (
    vocab_parallel_stepwise_surrogate,
    vocab_parallel_token_stats,
)

__all__ = ["vocab_parallel_stepwise_surrogate", "vocab_parallel_token_stats"]
