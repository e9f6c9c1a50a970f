"""Counting the work of forward passes: tokens, attention pairs, head rows, FLOPs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from egspo.models.experts import Experts, Router
from egspo.models.lora import is_of_reference
from egspo.models.lora_experts import LoraExperts


@dataclass
class Work:
    """Forward passes, counted on the host: no synchronisation."""

    forwards: int = 0
    """Calls of the model."""
    sequences: int = 0
    """Sequences in them."""
    tokens: int = 0
    """Columns computed, padding included."""
    spared_columns: int = 0
    """Columns less than if every trajectory computed its own prompt."""
    pairs: int = 0
    """Pairs of a query and a key."""
    head_rows: int = 0
    """Rows multiplied by the LM head."""
    scored_rows: int = 0
    """Those that were without gradients, in a pass that has them."""
    value_rows: int = 0
    """Rows multiplied by the value head; twice where its gradient is made too."""
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

    def __add__(self, other: Work) -> Work:
        names = [f.name for f in fields(self)]
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __sub__(self, other: Work) -> Work:
        names = [f.name for f in fields(self)]
        return Work(**{name: getattr(self, name) - getattr(other, name) for name in names})

    def copy(self) -> Work:
        return self - Work()


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of a model's passes, a multiplication and an addition counting as two.

    Matrix products only, as :class:`torch.utils.flop_counter.FlopCounterMode` counts them.
    """

    per_token: int
    """Of the linear layers forward, adapters included and the head left out; of experts, those
    that a token goes through."""
    per_token_backward: int
    """Of the same: gradients of inputs, and of the weights that are trained."""
    per_pair: int
    """Of attention forward."""
    per_head_row: int
    per_value_row: int
    head_trained: bool
    checkpointed: bool
    """Whether the backward pass runs the forward pass again."""
    per_token_again: int
    """Of the linear layers when it does: the last of a block has nothing behind it to serve."""

    @classmethod
    def of(cls, model: Any) -> ModelCost | None:
        """Of a transformer; None for a model that does not say its sizes."""
        config = getattr(model, "config", None)
        width = getattr(config, "hidden_size", None)
        layers = getattr(config, "num_hidden_layers", None)
        if width is None or layers is None:
            return None
        head = model.get_output_embeddings()
        # Not of the weight, which may be elsewhere.
        vocabulary = head.num_embeddings if isinstance(head, nn.Embedding) else head.out_features
        forward = backward = last = 0
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head and not is_of_reference(name):
                product = 2 * module.in_features * module.out_features
                forward += product
                backward += product * (2 if module.weight.requires_grad else 1)
                down = module.in_features > width and module.out_features == width
                last += product if down else 0
            elif isinstance(module, LoraExperts):
                active = [a for a in module.r if not is_of_reference(a)]
                product = 2 * sum(map(module.active_parameters, active))
                forward += product
                backward += product * 2
            elif isinstance(module, Router | Experts):
                product = 2 * module.active_parameters
                trained = any(p.requires_grad for p in module.parameters(recurse=False))
                forward += product
                backward += product * (2 if trained else 1)
        heads = model.config.num_attention_heads
        inner = heads * getattr(config, "head_dim", width // heads)
        return cls(
            per_token=forward,
            per_token_backward=backward,
            per_pair=4 * inner * layers,
            per_head_row=2 * width * vocabulary,
            per_value_row=2 * width,
            head_trained=head.weight.requires_grad,
            checkpointed=any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
            per_token_again=forward - last,
        )

    def forward(self, work: Work) -> int:
        """FLOPs of ``work`` without gradients."""
        return (
            work.tokens * self.per_token
            + work.pairs * self.per_pair
            + (work.head_rows + work.scored_rows) * self.per_head_row
            + work.value_rows * self.per_value_row
        )

    def training(self, work: Work) -> int:
        """FLOPs of ``work`` and its backward pass, which makes the logits again."""
        # Attention's backward pass makes the scores again: five products for two.
        attention = self.per_pair * work.pairs
        head = self.per_head_row * work.head_rows
        flops = (
            work.tokens * (self.per_token + self.per_token_backward)
            + attention * 7 // 2
            + head * (4 if self.head_trained else 3)
            + self.per_head_row * work.scored_rows
            + self.per_value_row * work.value_rows
        )
        if self.checkpointed:
            flops += work.tokens * self.per_token_again + attention
        return flops


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes allocated on a GPU so far, or resident in a process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
