"""A masked diffusion language model as the algorithm sees it: hidden states and a head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from egspo.models import reference_mode, special_token_ids
from egspo.models.cache import KeyValueCache
from egspo.models.experts import routed_layers
from egspo.models.offload import ActivationOffload
from egspo.models.routes import Routes
from egspo.rollouts.graphs import GraphReplay, Inputs
from egspo.rollouts.routing import Agreement
from egspo.rollouts.work import Work


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
        activation_offload: keep what the backward pass needs of the model in host memory.

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
        activation_offload: bool = False,
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
        self.offload = ActivationOffload(model.parameters()) if activation_offload else None
        self._use_reference = False
        self.reference_adapter: str | None = None
        """That the reference policy has, where the policy has one; None for the base alone."""
        self._replaying = False
        self.graphs = GraphReplay()
        """Of the passes made inside :meth:`graphed`."""
        self.agreement = Agreement()
        """Of the policy's experts in replay and update with those of the rollout."""
        self.work = Work()
        """Forward passes so far, of the policy and of the reference."""

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: nn.Module | None = None,
        autocast: torch.dtype | None = None,
        activation_offload: bool = False,
    ) -> Denoiser:
        """``model`` with the special tokens that it and its tokenizer agree on.

        Raises:
            ValueError: they do not; see :func:`egspo.models.special_token_ids`.
        """
        tokens = special_token_ids(tokenizer, model.config)
        return cls(
            model,
            mask_id=tokens.mask,
            eos_id=tokens.eos,
            pad_id=tokens.pad,
            reference=reference,
            autocast=autocast,
            activation_offload=activation_offload,
        )

    @property
    def reference_model(self) -> nn.Module | None:
        """The frozen copy, where that is the reference policy."""
        return self._reference

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

    @property
    def prediction_shift(self) -> int:
        """How many columns before a position the hidden state that predicts it is made.

        0 for LLaDA. Where it is 1 the model aligns the rows it returns, so that a pass over some
        columns must begin one column earlier.
        """
        return int(getattr(self.model.config, "prediction_shift", 0))

    @property
    def block_size(self) -> int | None:
        """Of a block-causal model; None where attention has no direction."""
        return getattr(self.model.config, "block_size", None)

    @property
    def experts(self) -> tuple[int, int] | None:
        """Layers with experts, and experts of a token in each; None without any."""
        layers = routed_layers(self.model)
        return (layers, int(self.model.config.num_experts_per_tok)) if layers else None  # type: ignore[union-attr, arg-type]

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
        self.work.add(input_ids.shape[0], input_ids.shape[1], input_ids.shape[1])
        return self._forward({"input_ids": input_ids, "attention_mask": attention_mask}, None)

    def hidden_states_and_cache(
        self, input_ids: Tensor, attention_mask: Tensor | None, routes: Routes | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """:meth:`hidden_states`, and the keys and values that made them."""
        self.work.add(input_ids.shape[0], input_ids.shape[1], input_ids.shape[1])
        with self._offloaded():
            output = self._active(
                input_ids=input_ids,
                attention_mask=attention_mask,
                compute_logits=False,
                return_cache=True,
                **_given(routes),
            )
        self.work.cache_bytes += output.cache.nbytes
        return output.last_hidden_state, output.cache

    def cached_hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: KeyValueCache,
        columns: Tensor,
        live: Tensor | None,
        routes: Routes | None = None,
    ) -> Tensor:
        """Hidden states [B, N, D] of some columns, the others' keys and values being cached.

        Args:
            input_ids: int64 [B, N], tokens at the columns.
            attention_mask: bool [B, S], False at padding; None where nothing is padded.
            cache: of the S columns; overwritten at ``columns`` where gradients are off.
            columns: int64 [B, N].
            live: bool [B, N], False where the cache is to be kept.
            routes: of the experts; not of passes that are replayed as CUDA graphs.
        """
        self.work.add(input_ids.shape[0], input_ids.shape[1], cache.length)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "columns": columns,
            "live": live,
        }
        if routes is not None:
            return self._hidden(inputs, cache, routes)
        return self._forward(inputs, cache)

    def stream_hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        streams: Tensor,
        *,
        cache: KeyValueCache | None = None,
        columns: Tensor | None = None,
        live: Tensor | None = None,
        keep: bool = False,
        routes: Routes | None = None,
    ) -> tuple[Tensor, KeyValueCache | None]:
        """Hidden states [B, N, D] of clean columns and copies of blocks.

        See :mod:`egspo.models.blocks`.

        Args:
            input_ids: int64 [B, N].
            attention_mask: bool [B, S], False at padding.
            position_ids, streams: int64 [B, S].
            cache, columns, live: as of :meth:`cached_hidden_states`, where N of the S columns are
                computed.
            keep: also return the keys and values of all S.
            routes: of the experts.
        """
        self.work.add(input_ids.shape[0], input_ids.shape[1], streams.shape[1])
        with self._offloaded():
            output = self._active(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                streams=streams,
                cache=cache,
                columns=columns,
                live=live,
                compute_logits=False,
                return_cache=keep,
                **_given(routes),
            )
        if keep:
            self.work.cache_bytes += output.cache.nbytes
        return output.last_hidden_state, output.cache

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] of hidden states [N, D]."""
        logits = torch.nn.functional.linear(hidden, self.head_weight, self.head_bias)
        self.work.head_rows += logits.shape[0]
        self.work.logits_bytes += logits.numel() * logits.element_size()
        return logits

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the reference policy answers: the frozen copy, or the base with the adapter
        of the reference, or with none."""
        if self._reference is not None:
            self._use_reference = True
            try:
                yield
            finally:
                self._use_reference = False
        elif isinstance(self.model, PeftModel):
            with reference_mode(self.model, self.reference_adapter):
                yield
        else:
            raise RuntimeError("this model has neither adapters to switch off nor a frozen copy")

    @property
    def replaying(self) -> bool:
        """Whether passes are replayed as CUDA graphs, which have caches of their own."""
        return self._replaying

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Inside :meth:`graphed`, passes that are to write the cache they are given."""
        before, self._replaying = self._replaying, False
        try:
            yield
        finally:
            self._replaying = before

    @contextmanager
    def graphed(self) -> Iterator[None]:
        """Inside, passes without gradients are replayed as CUDA graphs.

        Graphs are kept for the next time. They read the weights where they are: parameters may
        change in place, but not be replaced.
        """
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False

    def _forward(self, inputs: Inputs, cache: KeyValueCache | None) -> Tensor:
        if not self._replaying or self._use_reference or torch.is_grad_enabled():
            return self._hidden(inputs, cache)

        def uncached(inputs: Inputs, cache: KeyValueCache | None) -> Tensor:
            # A graph must cast weights itself: those that autocast caches are freed with it.
            if self._autocast is None:
                return self._hidden(inputs, cache)
            with torch.autocast(self.device.type, self._autocast, cache_enabled=False):
                return self._hidden(inputs, cache)

        return self.graphs.run(uncached, inputs, cache)

    def _hidden(
        self, inputs: Inputs, cache: KeyValueCache | None, routes: Routes | None = None
    ) -> Tensor:
        given: dict[str, Any] = _given(routes)
        if cache is not None:
            given["cache"] = cache
        with self._offloaded():
            output = self._active(**inputs, **given, compute_logits=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _offloaded(self) -> AbstractContextManager[object]:
        """The passes of the model: what the head saves is small, and the head reads weights."""
        return nullcontext() if self.offload is None else self.offload()

    @property
    def _active(self) -> nn.Module:
        if self._use_reference:
            assert self._reference is not None
            return self._reference
        return self.model


def _given(routes: Routes | None) -> dict[str, Any]:
    """As models without experts need not know of it."""
    return {} if routes is None else {"routes": routes}
