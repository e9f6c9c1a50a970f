"""A reference policy that follows the one that is trained: ``algorithm.reference_every``."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from egspo.config import AlgorithmConfig
from egspo.files import CheckpointError
from egspo.models.lora import REFERENCE_ADAPTER, reference_factors
from egspo.rollouts.denoiser import Denoiser

REFERENCE_FILE = "reference.safetensors"
"""Of a checkpoint, once the reference was refreshed; before that it is what training began from."""


class ReferenceRefresh:
    """Moves the reference policy of ``denoiser`` towards the policy, between training steps.

    Of a model whose weights are trained that is the frozen copy. Of adapters it is the second one
    (:func:`egspo.models.lora.add_reference_adapter`). Of a new one it answers from the first
    refresh on; until then the reference is the base. Of an adapter that training goes on from it is
    a copy, and answers from the beginning.

    A blend is one of numbers: ``reference <- blend * policy + (1 - blend) * reference``, rounded to
    the dtype of the weights. Of adapters it is one of the factors B and A, not of what they add to
    a weight: the new product is

        (b B + (1 - b) B') (b A + (1 - b) A') = b^2 B A + (1 - b)^2 B' A' + b (1 - b) (B A' + B' A)

    which is the blend of the products where b is 1, or where the two have a factor in common; it
    stays of the adapter's rank, as a blend of products would not. In the beginning A' is A and B'
    is B, which of a new adapter is zero.

    Args:
        config: nothing is refreshed without ``reference_every``.
        denoiser: of the policy; with its reference, where that is to be refreshed.
    """

    def __init__(self, config: AlgorithmConfig, denoiser: Denoiser) -> None:
        self._every, self._blend = config.reference_every, config.reference_blend
        self._denoiser = denoiser
        self._collected: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Of the file in a checkpoint."""
        return 0 if self._every is None else sum(t.nbytes for t in self._weights()[1].values())

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Refresh, if it is due after the training step ``step``, from 1."""
        if self._every is None or step % self._every:
            return
        policies, references = self._weights()
        for name, reference in references.items():
            policy = policies[name]
            if self._blend == 1.0:
                reference.copy_(policy)
            else:
                blended = torch.lerp(reference.float(), policy.float(), self._blend)
                reference.copy_(blended)
        self._use()

    def collect(self, step: int, *, main: bool) -> None:
        """Before :meth:`save`: the reference after ``step``, whole, in the ``main`` process.

        Of a sharded model every process calls this.
        """
        self._collected = {}
        if self._every is None or step < self._every:
            return
        for name, tensor in self._weights()[1].items():
            whole = tensor.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            if main:
                self._collected[name] = whole.contiguous()

    def save(self, folder: Path) -> None:
        """Put what was collected into the folder of a checkpoint, if the reference has moved."""
        if self._collected:
            save_file(self._collected, folder / REFERENCE_FILE)

    @torch.no_grad()
    def load(self, folder: Path, step: int) -> None:
        """Restore what :meth:`save` did; before the model is sharded.

        Raises:
            CheckpointError: the file is missing or does not fit the model.
        """
        if self._every is None or step < self._every:
            return
        file = folder / REFERENCE_FILE
        if not file.is_file():
            raise CheckpointError(f"{folder} has no {REFERENCE_FILE}, the refreshed reference")
        tensors, references = load_file(file), self._weights()[1]
        shapes, expected = (
            {name: t.shape for name, t in ts.items()} for ts in (tensors, references)
        )
        if shapes != expected:
            names = sorted(n for n in {*shapes, *expected} if shapes.get(n) != expected.get(n))
            raise CheckpointError(f"{file} does not fit the model: {', '.join(names[:5])} differ")
        for name, reference in references.items():
            reference.copy_(tensors[name])
        self._use()

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the policy and of the reference, by the policy's names; an engine replaces them."""
        model, copy = self._denoiser.model, self._denoiser.reference_model
        if copy is not None:
            return dict(model.named_parameters()), dict(copy.named_parameters())
        assert isinstance(model, PeftModel)
        return reference_factors(model)

    def _use(self) -> None:
        if self._denoiser.reference_model is None:
            self._denoiser.reference_adapter = REFERENCE_ADAPTER
