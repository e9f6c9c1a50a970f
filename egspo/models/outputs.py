"""What models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput

from egspo.models.cache import KeyValueCache


@dataclass
class TransformerOutput(ModelOutput):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """What a transformer without a head returns; attributes as in :class:`MaskedLMOutput`."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cache: KeyValueCache | None = None


@dataclass
class MaskedLMOutput(ModelOutput):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """What a transformer with a head returns.

    Attributes:
        loss: float32 scalar, where labels were given.
        logits: [B, N, vocabulary], None with ``compute_logits=False``.
        cache: keys and values, with ``return_cache=True``.
        last_hidden_state: [B, N, D] after the final norm: row ``i`` is what the head needs to
            predict the token at ``i``.
        hidden_states: ``layers + 1`` tensors [B, N, D] as the layers have them, the last one after
            the final norm.
        attentions: ``layers`` tensors [B, H, N, S].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: KeyValueCache | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
