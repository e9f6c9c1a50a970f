"""Problems for the surrogate's backends, and how close to the truth an answer must be."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from egspo_kernels import Surrogate, reference, stepwise_surrogate
from egspo_kernels.shared.objective import aggregate_steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIELDS = ("loss", "log_prob", "ratio", "kl")


@dataclasses.dataclass
class Problem:
    """Arguments of ``stepwise_surrogate``; the last step has no token."""

    logits: Tensor
    targets: Tensor
    step_ids: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    options: dict[str, Any]

    @classmethod
    def make(
        cls,
        rows: int,
        vocab: int,
        dtype: torch.dtype = torch.float32,
        kl: str | None = None,
        aggregation: str = "sum",
        *,
        steps: int | None = None,
        beta: float = 0.3,
        seed: int = 0,
    ) -> Problem:
        generator = torch.Generator().manual_seed(rows * 131 + vocab + seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        steps = rows // 2 + 1 if steps is None else steps
        banned = None if vocab == 1 else vocab // 3
        logits = (4 * normal(rows, vocab)).to(dtype)
        ref_logits = (logits.float() + 0.3 * normal(rows, vocab)).to(dtype)
        targets = torch.randint(vocab, (rows,), generator=generator)
        if banned is not None:
            targets[targets == banned] = vocab - 1
        step_ids = torch.randint(steps, (rows,), generator=generator)
        scores = reference.tempered(logits.double(), 0.7, banned)
        token = reference.gather_last(reference.log_softmax(scores), targets)
        old = aggregate_steps(token, step_ids, steps + 1, aggregation)  # type: ignore[arg-type]
        options = {
            "clip_low": 0.2,
            "clip_high": 0.3,
            "beta": beta if kl else 0.0,
            "kl": kl,
            "ref_logits": ref_logits.to(DEVICE) if kl else None,
            "weights": torch.rand(steps + 1, generator=generator).to(DEVICE),
            "temperature": 0.7,
            "banned_token": banned,
            "aggregation": aggregation,
        }
        return cls(
            logits.to(DEVICE),
            targets.to(DEVICE),
            step_ids.to(DEVICE),
            # Ratios on both sides of both clips.
            (old + 0.3 * normal(steps + 1)).float().to(DEVICE),
            normal(steps + 1).to(DEVICE),
            options,
        )

    def replace(self, **changes: Any) -> Problem:
        """With other arguments or options."""
        fields = {field.name for field in dataclasses.fields(self)}
        options = {key: value for key, value in changes.items() if key not in fields}
        arguments = {key: value for key, value in changes.items() if key in fields}
        return dataclasses.replace(self, **arguments, options=self.options | options)

    def double(self) -> Problem:
        """In float64 throughout."""
        ref_logits = self.options["ref_logits"]
        return self.replace(
            logits=self.logits.double(),
            ref_logits=None if ref_logits is None else ref_logits.double(),
        )

    def run(self, backend: str, logits: Tensor | None = None) -> Surrogate:
        return stepwise_surrogate(
            self.logits if logits is None else logits,
            self.targets,
            self.step_ids,
            self.old_log_prob,
            self.advantage,
            backend=backend,
            **self.options,
        )

    def solve(self, backend: str, scale: float = 1.0) -> tuple[Surrogate, Tensor]:
        """The surrogate, and the gradient of ``scale`` times its loss."""
        logits = self.logits.detach().requires_grad_()
        surrogate = self.run(backend, logits)
        (gradient,) = torch.autograd.grad(scale * surrogate.loss, logits)
        return surrogate, gradient


def rounding_of(truth: Surrogate) -> float:
    """Relative rounding of what comes out of ``exp``: that of a step's log-probability."""
    sizes = truth.log_prob.abs()
    return 2.0**-22 * max(4.0, float(sizes[sizes.isfinite()].amax(0)) if len(sizes) else 0.0)


def assert_close_enough(
    value: Tensor, truth: Tensor, baseline: Tensor, rounding: float, what: str
) -> None:
    """An error at most twice that of plain PyTorch in float32, plus rounding."""
    assert value.shape == truth.shape, what
    finite = truth.isfinite()
    assert torch.equal(value[~finite].double().nan_to_num(), truth[~finite].nan_to_num()), what
    if not bool(finite.any()):
        return
    value, truth, baseline = (tensor[finite].double() for tensor in (value, truth, baseline))
    error, plain = (value - truth).abs().max(), (baseline - truth).abs().max()
    # A KL is what is left of terms as large as the logits' differences.
    floor = 1e-6 if what == "kl" else 2e-7
    allowed = 2 * plain + rounding * truth.abs().max() + floor
    assert bool(error <= allowed), f"{what}: {float(error):.2e} > {float(allowed):.2e}"


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    """NaN equal to NaN."""
    assert left.dtype == right.dtype and left.shape == right.shape
    left, right = (tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in (left, right))
    assert torch.equal(left, right)


def is_nan(value: Tensor) -> bool:
    return math.isnan(float(value.detach()))
