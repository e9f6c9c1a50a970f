"""The Triton backend of the linear forms: in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from egspo_kernels import linear_stepwise_surrogate, stepwise_surrogate, token_stats
from tests.helpers.marks import first_fast
from tests.kernels.linear_cases import (
    BANNED,
    TEMPERATURE,
    Head,
    chunks_of,
    statistics,
    surrogate,
)
from tests.kernels.surrogate_cases import (
    DEVICE,
    FIELDS,
    assert_close_enough,
    assert_same_bits,
    rounding_of,
)

pytest.importorskip("triton")
# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("round_to_nearest"),
]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype", "bias", "targets"),
    [
        (5, 700, torch.float32, True, True),
        (5, 700, torch.bfloat16, True, True),
        (5, 700, torch.float16, False, True),
        (3, 9000, torch.bfloat16, False, False),
        (3, 9000, torch.float32, True, False),
        (1, 20, torch.float32, False, True),
        (0, 20, torch.float32, True, True),
    ],
)
def test_statistics(rows: int, vocab: int, dtype: torch.dtype, bias: bool, targets: bool) -> None:
    head = Head.make(rows, vocab, dtype, bias)
    chosen = head.targets if targets else None
    value, gradients = statistics(
        head, "triton", chosen, workspace_bytes=chunks_of(2, vocab, dtype)
    )
    baseline, plain = statistics(head, "reference", chosen)
    # The product itself is rounded to the dtype: what follows is compared on the same logits.
    logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    truth = token_stats(
        logits.double(), chosen, temperature=TEMPERATURE, banned_token=BANNED, backend="reference"
    )
    assert torch.equal(value.argmax, truth.argmax)
    for name in ("logsumexp", "entropy", "log_prob", "confidence"):
        result, exact, eager = (getattr(s, name) for s in (value, truth, baseline))
        assert (result is None) == (exact is None)
        if result is not None:
            assert_close_enough(result, exact, eager, 2.0**-20, name)
    assert not value.argmax.requires_grad and not value.confidence.requires_grad
    _, exact_gradients = statistics(head.to(torch.float64), "reference", chosen)
    for gradient, exact, eager in zip(gradients, exact_gradients, plain, strict=True):
        assert gradient.dtype == dtype
        # Logits made once in half precision differ from those in double: so do both gradients.
        assert_close_enough(gradient, exact, eager, 2.0**-20, "gradient")


@pytest.mark.parametrize("dtype", first_fast(FLOATS))
@pytest.mark.parametrize(
    ("kl", "aggregation"),
    [(None, "sum"), ("k3", "mean"), ("exact", "sum"), ("exact", "mean"), ("exact", "exact")],
)
def test_surrogate(kl: str | None, aggregation: str, dtype: torch.dtype) -> None:
    head = Head.make(5, 700, dtype, bias=kl is None)
    workspace = chunks_of(2, 700, dtype, reference=kl == "exact")
    value, gradients = surrogate(head, "triton", kl, aggregation, workspace_bytes=workspace)
    baseline, plain = surrogate(head, "reference", kl, aggregation)
    truth, exact = surrogate(head.to(torch.float64), "reference", kl, aggregation)
    rounding = rounding_of(truth)
    for name in FIELDS:
        result, eager = getattr(value, name), getattr(baseline, name)
        assert_close_enough(result, getattr(truth, name), eager, rounding, name)
    for gradient, right, eager in zip(gradients, exact, plain, strict=True):
        assert gradient.dtype == dtype
        assert_close_enough(gradient, right, eager, rounding, "gradient")


def test_reference_log_prob_may_be_given() -> None:
    head = Head.make(5, 700, bias=False)
    ref = torch.tensor([-11.0, -21.0, 0.0], device=DEVICE)
    results = [
        linear_stepwise_surrogate(
            head.hidden,
            head.weight,
            head.targets,
            torch.tensor([1, 0, 0, 1, 1], device=DEVICE),
            ref,
            ref,
            clip_low=0.2,
            clip_high=0.2,
            beta=0.1,
            kl="k3",
            ref_log_prob=ref,
            backend=backend,
        ).loss
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kl", first_fast([None, "k3", "exact"]))
def test_one_chunk_is_the_form_of_logits(kl: str | None) -> None:
    """To the bit, run to run too: the kernels are the same."""
    head = Head.make(5, 700, bias=False)
    value, (grad_hidden, _) = surrogate(head, "triton", kl)
    again, (same_gradient, _) = surrogate(head, "triton", kl)
    assert_same_bits(grad_hidden, same_gradient)
    logits = (head.hidden @ head.weight.t()).requires_grad_()
    expected = stepwise_surrogate(
        logits,
        head.targets,
        torch.tensor([1, 0, 0, 1, 1], device=DEVICE),
        torch.tensor([-12.0, -20.0, 0.1], device=DEVICE),
        torch.tensor([1.0, -2.0, 0.5], device=DEVICE),
        clip_low=1.0,
        clip_high=100.0,
        kl=kl,  # type: ignore[arg-type]
        beta=0.3 if kl else 0.0,
        ref_logits=head.ref_hidden @ head.ref_weight.t() if kl else None,
        temperature=TEMPERATURE,
        banned_token=BANNED,
        backend="triton",
    )
    for result, same, truth in zip(value, again, expected, strict=True):
        assert_same_bits(result, same)
        assert_same_bits(result, truth)
    (gradient,) = torch.autograd.grad(expected.loss, logits)
    assert_same_bits(grad_hidden, gradient @ head.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("kl", [None, "k3", "exact"])
def test_real_size(kl: str | None) -> None:
    """LLaDA's vocabulary in several chunks, without waiting for the GPU."""
    head = Head.make(5, 126464, torch.bfloat16, bias=False)
    workspace = chunks_of(2, 126464, torch.bfloat16, reference=kl == "exact")
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, gradients = surrogate(head, "triton", kl, workspace_bytes=workspace)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    baseline, plain = surrogate(head, "reference", kl)
    truth, exact = surrogate(head.to(torch.float64), "reference", kl)
    rounding = rounding_of(truth)
    assert_close_enough(value.log_prob, truth.log_prob, baseline.log_prob, rounding, "log_prob")
    for gradient, right, eager in zip(gradients, exact, plain, strict=True):
        assert_close_enough(gradient, right, eager, 2.0**-8, "gradient")
