"""The Triton surrogate in autograd and torch.compile: where gradients go, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from egspo_kernels import (
    Surrogate,
    UnavailableBackendError,
    available_backends,
    last_backend,
)
from tests.helpers.marks import first_fast
from tests.kernels.surrogate_cases import DEVICE, Problem, assert_same_bits

pytest.importorskip("triton")
# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("round_to_nearest"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def overwriting(logits: Tensor, backend: str = "triton", **changes: Any) -> Tensor:
    problem = Problem.make(6, 300).replace(overwrite_logits=True, **changes)
    return problem.run(backend, logits).loss


def test_overwriting_on_request_only() -> None:
    problem = Problem.make(6, 300, torch.bfloat16)
    expected = problem.solve("triton")[1]
    for overwrite in (False, True):
        leaf = problem.logits.clone().requires_grad_()
        logits = leaf * 1
        problem.replace(overwrite_logits=overwrite).run("triton", logits).loss.backward()
        assert leaf.grad is not None
        assert_same_bits(logits, expected if overwrite else problem.logits)
        assert_same_bits(leaf.grad, expected)


def test_overwriting_is_noticed_by_others() -> None:
    leaf = Problem.make(6, 300).logits.requires_grad_()
    logits = leaf * 1
    square = (logits**2).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square + overwriting(logits)).backward()
    logits = leaf * 1
    loss = overwriting(logits)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_overwriting_refused() -> None:
    leaf = Problem.make(6, 300).logits.requires_grad_()
    with pytest.raises(ValueError, match=r"overwrite_logits.*leaf"):
        overwriting(leaf)
    with pytest.raises(ValueError, match=r"overwrite_logits.*'reference'"):
        overwriting(leaf * 1, "reference")
    with pytest.raises(ValueError, match=r"overwrite_logits.*strides \(1, 6\)"):
        overwriting((leaf * 1).t().contiguous().t())
    with pytest.raises(ValueError, match=r"overwrite_logits.*strides \(0, 1\)"):
        overwriting((leaf * 1)[:1].expand(6, -1))
    logits = leaf * 1
    with pytest.raises(ValueError, match=r"overwrite_logits.*ref_logits"):
        overwriting(logits, kl="exact", ref_logits=logits.detach())
    with pytest.raises(Exception, match="overwrite_logits is for eager mode"):
        problem = Problem.make(6, 300).replace(overwrite_logits=True)
        torch.compile(problem.run, backend="eager", fullgraph=True)("triton", leaf * 1)


def test_differentiable_once() -> None:
    problem = Problem.make(3, 50)
    logits = problem.logits.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(problem.run("triton", logits).loss, logits, create_graph=True)
    value = problem.run("triton", logits)
    assert not any(tensor.requires_grad for tensor in value[1:])
    with torch.no_grad():
        assert not problem.run("triton", logits).loss.requires_grad


def test_which_backend_runs() -> None:
    problem = Problem.make(3, 50)
    listing = available_backends(DEVICE)["stepwise_surrogate"]
    assert listing.keys() == {"triton", "cpp", "reference"}
    assert listing["triton"] is None and listing["reference"] is None
    problem.run("auto")
    # The interpreter runs on request only; the compiled library may not have been built.
    on_cpu = "reference" if listing["cpp"] else "cpp"
    assert last_backend("stepwise_surrogate") == ("triton" if DEVICE == "cuda" else on_cpu)
    with pytest.raises(UnavailableBackendError, match=r"'triton'.*float64"):
        problem.double().run("triton")
    with pytest.raises(UnavailableBackendError, match=r"'triton'.*float64"):
        problem.replace(kl="exact", ref_logits=problem.logits.double()).run("triton")
    problem.double().run("auto")
    assert last_backend("stepwise_surrogate") == "reference"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": torch.empty(0, 0), "targets": torch.empty(0).long()}, ValueError, "logits"),
        ({"ref_logits": torch.zeros(3, 50)}, ValueError, "ref_logits"),
        ({"ref_logits": torch.zeros(4, 50).long()}, TypeError, "ref_logits"),
    ],
)
def test_bad_arguments_are_named(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Problem.make(4, 50, kl="exact").replace(**change).run("auto")


@pytest.mark.parametrize(
    ("kl", "dtype"),
    first_fast([("exact", torch.bfloat16), ("k3", torch.bfloat16), (None, torch.float32)]),
)
def test_opcheck(kl: str | None, dtype: torch.dtype) -> None:
    from egspo_kernels.triton_kernels import surrogate  # registers the operators

    del surrogate
    problem = Problem.make(4, 300, dtype, kl, beta=0.1)
    ref_logits = problem.options["ref_logits"]
    steps = (problem.step_ids, problem.old_log_prob, problem.advantage, None, None, ref_logits)
    numbers = (0.2, 0.3, 0.1 if kl else 0.0, kl, "sum", 0.7, 5)
    logits = problem.logits.requires_grad_()
    forward = torch.ops.egspo.stepwise_surrogate.default
    arguments = (logits, problem.targets, *steps, *numbers)
    torch.library.opcheck(forward, arguments)
    exact = ref_logits if kl == "exact" else None
    saved = [tensor.detach() for tensor in forward(*arguments)[len(Surrogate._fields) :]]
    grad_loss = torch.ones((), device=DEVICE)
    torch.library.opcheck(
        torch.ops.egspo.stepwise_surrogate_backward.default,
        (grad_loss, logits.detach(), problem.targets, problem.step_ids, exact, saved, 0.7, 5),
    )


@pytest.mark.parametrize(
    ("backend", "kl"),
    first_fast(
        [
            ("auto", "k3"),
            ("triton", "exact"),
            ("triton", "k3"),
            ("triton", None),
            ("reference", None),
        ]
    ),
)
def test_whole_graph(backend: str, kl: str | None) -> None:
    def loss_and_more(logits: Tensor, problem: Problem) -> tuple[Tensor, Surrogate]:
        surrogate = problem.run(backend, logits * 2)
        return 3 * surrogate.loss, surrogate

    compiled = torch.compile(loss_and_more, fullgraph=True, backend="aot_eager")
    for rows in (4, 6):
        problem = Problem.make(rows, 300, kl=kl)
        logits = problem.logits.requires_grad_()
        results = []
        for function in (loss_and_more, compiled):
            loss, surrogate = function(logits, problem)
            chosen = last_backend("stepwise_surrogate")
            assert backend in ("auto", chosen)
            assert not any(tensor.requires_grad for tensor in surrogate[1:])
            results.append((*surrogate, *torch.autograd.grad(loss, logits)))
        for eager, traced in zip(*results, strict=True):
            # On a CPU, auto is the compiled library in eager calls and the reference in a graph:
            # ratios of float32 log-probabilities, each rounded in its own order.
            rtol = 2e-5 if backend == "auto" else 1e-6
            torch.testing.assert_close(traced, eager, rtol=rtol, atol=1e-7)


def test_eager_calls_do_not_go_through_the_dispatcher_of_torch() -> None:
    problem = Problem.make(4, 300)
    with torch.profiler.profile() as profile:
        problem.solve("triton")
    assert not [event for event in profile.events() if event.name.startswith("egspo::")]
