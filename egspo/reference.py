"""A reference policy that follows the one that is trained: ``algorithm.reference_every``."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from egspo.checkpoint import CheckpointError
from egspo.config import AlgorithmConfig
from egspo.denoiser import Denoiser
from egspo.models.lora import REFERENCE_ADAPTER, reference_factors

REFERENCE_FILE = "reference.safetensors"
"""Of a checkpoint, once the reference was refreshed; before that it is what training began from."""


class ReferenceRefresh:
    """Moves the reference policy of ``denoiser`` towards the policy, between training steps.

    Of a model whose weights are trained that is the frozen copy. Of adapters it is the second one
    (:func:`egspo.models.lora.add_reference_adapter`), which answers from the first refresh on;
    until then it is the base, without adapter.

    A blend is one of numbers: ``reference <- blend * policy + (1 - blend) * reference``, rounded to
    the dtype of the weights. Of adapters it is one of the factors B and A, not of what they add to
    a weight: the new product is

        (b B + (1 - b) B') (b A + (1 - b) A') = b^2 B A + (1 - b)^2 B' A' + b (1 - b) (B A' + B' A)

    which is the blend of the products where b is 1, or where the two have a factor in common; it
    stays of the adapter's rank, as a blend of products would not. In the beginning A' is A, and B'
    zero.

    Args:
        config: nothing is refreshed without ``reference_every``.
        denoiser: of the policy; with its reference, where that is to be refreshed.
    """

    def __init__(self, config: AlgorithmConfig, denoiser: Denoiser) -> None:
        self._every, self._blend = config.reference_every, config.reference_blend
        self._denoiser = denoiser
        self._policy: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}
        if self._every is None:
            return
        model, copy = denoiser.model, denoiser.frozen_copy
        if copy is not None:
            self._policy = dict(model.named_parameters())
            self._reference = dict(copy.named_parameters())
        else:
            assert isinstance(model, PeftModel)
            self._policy, self._reference = reference_factors(model)

    @property
    def bytes(self) -> int:
        """Of the file in a checkpoint."""
        return sum(tensor.nbytes for tensor in self._reference.values())

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Refresh, if it is due after the training step ``step``, from 1."""
        if self._every is None or step % self._every:
            return
        for name, reference in self._reference.items():
            policy = self._policy[name]
            if self._blend == 1.0:
                reference.copy_(policy)
            else:
                blended = torch.lerp(reference.float(), policy.float(), self._blend)
                reference.copy_(blended)
        self._use()

    def save(self, folder: Path, step: int) -> None:
        """Put the reference after ``step`` into the folder of a checkpoint, if it has moved."""
        if self._every is not None and step >= self._every:
            tensors = {name: t.detach().contiguous() for name, t in self._reference.items()}
            save_file(tensors, folder / REFERENCE_FILE)

    @torch.no_grad()
    def load(self, folder: Path, step: int) -> None:
        """Restore what :meth:`save` did.

        Raises:
            CheckpointError: the file is missing or does not fit the model.
        """
        if self._every is None or step < self._every:
            return
        file = folder / REFERENCE_FILE
        if not file.is_file():
            raise CheckpointError(f"{folder} has no {REFERENCE_FILE}, the refreshed reference")
        tensors = load_file(file)
        shapes, expected = (
            {name: t.shape for name, t in ts.items()} for ts in (tensors, self._reference)
        )
        if shapes != expected:
            names = sorted(n for n in {*shapes, *expected} if shapes.get(n) != expected.get(n))
            raise CheckpointError(f"{file} does not fit the model: {', '.join(names[:5])} differ")
        for name, reference in self._reference.items():
            reference.copy_(tensors[name])
        self._use()

    def _use(self) -> None:
        if self._denoiser.frozen_copy is None:
            self._denoiser.reference_adapter = REFERENCE_ADAPTER
