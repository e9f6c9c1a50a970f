"""Small models and checkpoints in the official layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from egspo.models import LLaDAForMaskedLM, new_model

TINY: dict[str, Any] = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "mlp_hidden_size": 48,
    "vocab_size": 60,
    "embedding_size": 64,
    "max_sequence_length": 64,
    "init_std": 0.2,  # large enough for attention to be far from uniform
    "mask_token_id": 5,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Fields of a model small enough for every test."""
    return dict(TINY)


@pytest.fixture
def make_model(tiny: dict[str, Any]) -> Callable[..., LLaDAForMaskedLM]:
    """A tiny model in evaluation mode; keyword arguments replace fields."""

    def make(seed: int = 0, attn_implementation: str = "sdpa", **fields: Any) -> LLaDAForMaskedLM:
        model = new_model({**tiny, **fields}, seed=seed).eval()
        model.set_attn_implementation(attn_implementation)
        return model

    return make


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(0, 60, (3, 11), generator=torch.Generator().manual_seed(0))
