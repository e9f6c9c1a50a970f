"""A masked diffusion language model as the algorithm sees it: hidden states and a head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel
from torch import Tensor, nn

from egspo.models import reference_mode


class Denoiser:
    """Forward passes of a model, its reference policy and its special tokens.

    The model is kept in evaluation mode: rollout, scoring and update all run without dropout, so
    that the first probability ratio is 1. Only the model is needed by the algorithm; training
    code decides what is trained.

    Args:
        model: called as ``model(input_ids=, attention_mask=, compute_logits=False)``; the result
            has ``last_hidden_state`` [B, S, D]. ``get_output_embeddings()`` gives the LM head.
        mask_id, eos_id, pad_id: token ids. ``[MASK]`` is banned from every softmax.
        reference: a frozen copy of the model, or None where adapters are switched off instead.
        autocast: dtype of autocast, None for none.

    Raises:
        ValueError: an adapter is on the LM head.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mask_id: int,
        eos_id: int,
        pad_id: int,
        reference: nn.Module | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if hasattr(model.get_output_embeddings(), "base_layer"):  # type: ignore[operator]
            raise ValueError(
                "the adapter also adapts the LM head, whose weight is used directly here: train "
                "the adapter without it"
            )
        self.model = model.eval()
        self.mask_id, self.eos_id, self.pad_id = mask_id, eos_id, pad_id
        self._reference = None if reference is None else reference.eval().requires_grad_(False)
        self._autocast = autocast
        self._use_reference = False

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def head_weight(self) -> Tensor:
        """[V, D] weight of the LM head of the active policy."""
        head = self._active.get_output_embeddings()  # type: ignore[operator]
        weight: Tensor = head.weight
        return weight

    @property
    def head_bias(self) -> Tensor | None:
        return getattr(self._active.get_output_embeddings(), "bias", None)  # type: ignore[operator]

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of every forward pass; enclose the head's product in it too."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Hidden states after the final norm, [B, S, D].

        Args:
            input_ids: int64 [B, S].
            attention_mask: bool [B, S], False at padding; None where nothing is padded.
        """
        mask = None if attention_mask is None else attention_mask.long()
        output = self._active(input_ids=input_ids, attention_mask=mask, compute_logits=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the reference policy answers: the frozen copy, or the adapter switched off."""
        if self._reference is not None:
            self._use_reference = True
            try:
                yield
            finally:
                self._use_reference = False
        elif isinstance(self.model, PeftModel):
            with reference_mode(self.model):
                yield
        else:
            raise RuntimeError("this model has neither adapters to switch off nor a frozen copy")

    @property
    def _active(self) -> nn.Module:
        if self._use_reference:
            assert self._reference is not None
            return self._reference
        return self.model
