"""Counting the work of forward passes: tokens, attention pairs, head rows, FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn


@dataclass
class Work:
    """Forward passes, counted on the host: no synchronisation."""

    forwards: int = 0
    """Calls of the model."""
    sequences: int = 0
    """Sequences in them."""
    tokens: int = 0
    """Columns computed, padding included."""
    pairs: int = 0
    """Pairs of a query and a key."""
    head_rows: int = 0
    """Rows multiplied by the LM head."""
    cache_bytes: int = 0
    """Keys and values stored."""
    logits_bytes: int = 0
    """Logits written."""

    def add(self, sequences: int, queries: int, keys: int) -> None:
        """A forward pass."""
        self.forwards += 1
        self.sequences += sequences
        self.tokens += sequences * queries
        self.pairs += sequences * queries * keys

    def __sub__(self, other: Work) -> Work:
        names = [f.name for f in fields(self)]
        return Work(**{name: getattr(self, name) - getattr(other, name) for name in names})

    def copy(self) -> Work:
        return self - Work()


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of a model's forward pass, a multiplication and an addition counting as two.

    Matrix products only, as :class:`torch.utils.flop_counter.FlopCounterMode` counts them.
    """

    per_token: int
    """Of the linear layers, adapters included and the head left out."""
    per_pair: int
    """Of attention."""
    per_head_row: int

    @classmethod
    def of(cls, model: Any) -> ForwardCost | None:
        """Of a transformer; None for a model that does not say its sizes."""
        config = getattr(model, "config", None)
        width = getattr(config, "hidden_size", None)
        layers = getattr(config, "num_hidden_layers", None)
        if width is None or layers is None:
            return None
        head = model.get_output_embeddings()
        linear = [
            module
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        return cls(
            per_token=sum(2 * m.in_features * m.out_features for m in linear),
            per_pair=4 * width * layers,
            per_head_row=2 * head.weight.shape[0] * head.weight.shape[1],
        )

    def flops(self, work: Work) -> int:
        return (
            work.tokens * self.per_token
            + work.pairs * self.per_pair
            + work.head_rows * self.per_head_row
        )
