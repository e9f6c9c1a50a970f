"""The Triton backend of the linear forms: memory, gradients asked for, torch.compile, refusals."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from egspo_kernels import (
    TokenStats,
    UnavailableBackendError,
    available_backends,
    last_backend,
    linear_stepwise_surrogate,
    linear_token_stats,
    token_stats,
)
from tests.helpers.marks import first_fast
from tests.kernels.linear_cases import Head, statistics
from tests.kernels.surrogate_cases import DEVICE, assert_same_bits

pytest.importorskip("triton")
# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("round_to_nearest"),
]


class PeakMode(TorchDispatchMode):
    """Follows the bytes of large tensors alive at once, beside those of the head."""

    def __init__(self, smallest: int, head: Head) -> None:
        super().__init__()
        self.smallest, self.alive, self.peak = smallest, 0, 0
        self.seen = {
            tensor.untyped_storage().data_ptr()
            for tensor in vars(head).values()
            if tensor is not None
        }

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage.data_ptr()
        if size < self.smallest or key in self.seen:
            return
        self.seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, size, key)

    def left(self) -> int:
        """Bytes still alive."""
        gc.collect()  # the interpreter's arguments refer to each other
        return self.alive

    def _drop(self, size: int, key: int) -> None:
        self.seen.discard(key)
        self.alive -= size


VOCAB = 3000


@pytest.mark.parametrize(
    ("kl", "dtype", "per_row"),
    first_fast(
        [
            ("k3", torch.bfloat16, 2 * VOCAB),
            ("exact", torch.bfloat16, 4 * VOCAB),
            (None, torch.float32, 4 * VOCAB),
            (None, torch.bfloat16, 2 * VOCAB),
        ]
    ),
)
def test_the_workspace_is_what_is_used(kl: str | None, dtype: torch.dtype, per_row: int) -> None:
    """Of tensors with a row of logits or more; with frozen weights, as in training."""
    head = Head.make(5, VOCAB, dtype, bias=False)
    workspace = 2 * (per_row + 20) + 19  # two rows and their partial sums, not three
    hidden = head.hidden.detach().requires_grad_()
    steps = torch.tensor([1, 0, 0, 1, 1], device=DEVICE)
    values = torch.tensor([-12.0, -20.0], device=DEVICE)
    with PeakMode(2 * VOCAB, head) as memory:
        result = linear_stepwise_surrogate(
            hidden,
            head.weight,
            head.targets,
            steps,
            values,
            values,
            clip_low=1.0,
            clip_high=100.0,
            kl=kl,  # type: ignore[arg-type]
            beta=0.3 if kl else 0.0,
            ref_hidden=head.ref_hidden if kl else None,
            workspace_bytes=workspace,
            backend="triton",
        )
        assert memory.peak == 2 * per_row and memory.left() == 0
        result.loss.backward()
    assert memory.peak == 2 * per_row and memory.left() == 0
    with PeakMode(2 * VOCAB, head) as memory:
        stats = linear_token_stats(
            hidden, head.weight, head.targets, workspace_bytes=workspace, backend="triton"
        )
        assert stats.log_prob is not None and memory.left() == 0
        stats.log_prob.sum().backward()
    rows = workspace // (dtype.itemsize * VOCAB + 20)
    assert memory.peak == rows * dtype.itemsize * VOCAB and memory.left() == 0


def test_workspace_too_small() -> None:
    head = Head.make(5, VOCAB, torch.bfloat16, bias=False)
    for backend, needed in (("triton", 2 * VOCAB + 20), ("reference", 24 * VOCAB)):
        arguments = (head.hidden, head.weight, head.targets)
        linear_token_stats(*arguments, workspace_bytes=needed, backend=backend)
        with pytest.raises(ValueError, match=f"workspace_bytes.* {needed} bytes.*'{backend}'"):
            linear_token_stats(*arguments, workspace_bytes=needed - 1, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_logits_dtype(backend: str) -> None:
    """On a GPU the product in float32 is nearer the truth than one rounded to bfloat16."""
    head = Head.make(5, 700, torch.bfloat16, bias=True)

    def run(**options: Any) -> tuple[TokenStats, tuple[Tensor, ...]]:
        return statistics(head, backend, head.targets, **options)

    expected, _ = run()
    same, _ = run(logits_dtype=torch.bfloat16)
    assert_same_bits(same.entropy, expected.entropy)
    with pytest.raises(TypeError, match=r"logits_dtype.*float16"):
        run(logits_dtype=torch.float16)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"logits_dtype.*needs a GPU"):
            run(logits_dtype=torch.float32)
        return
    truth, exact = statistics(head.to(torch.float64), "reference", head.targets)
    wide, gradients = run(logits_dtype=torch.float32)
    assert wide.log_prob is not None and expected.log_prob is not None
    assert bool((wide.log_prob - truth.log_prob).abs().max() < 1e-5)
    assert bool((expected.log_prob - truth.log_prob).abs().max() > 1e-4)
    for gradient, right in zip(gradients, exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), right, rtol=2e-2, atol=2e-2)


def test_gradient_only_where_required() -> None:
    head = Head.make(3, 50)
    hidden = head.hidden.detach().requires_grad_()
    stats = linear_token_stats(hidden, head.weight, head.targets, backend="triton")
    assert stats.log_prob is not None
    stats.log_prob.sum().backward()
    assert hidden.grad is not None and head.weight.grad is None
    weight = head.weight.detach().requires_grad_()
    entropy = linear_token_stats(head.hidden, weight, None, backend="triton").entropy
    entropy.sum().backward()
    assert weight.grad is not None and head.hidden.grad is None
    with pytest.raises(RuntimeError, match="differentiable once"):
        again = linear_token_stats(hidden, head.weight, None, backend="triton").entropy
        torch.autograd.grad(again.sum(), hidden, create_graph=True)
    with torch.no_grad():
        stats = linear_token_stats(hidden, head.weight, None, backend="triton")
        assert not stats.entropy.requires_grad


def test_under_autocast_the_backward_pass_repeats_the_product() -> None:
    head = Head.make(3, 50)
    hidden = head.hidden.detach().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        stats = linear_token_stats(hidden, head.weight, head.targets, backend="triton")
    logits = head.hidden.bfloat16() @ head.weight.bfloat16().t()
    assert stats.log_prob is not None
    assert_same_bits(stats.log_prob, token_stats(logits, head.targets, backend="triton").log_prob)
    stats.log_prob.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_which_backend_runs() -> None:
    head = Head.make(3, 50, bias=False)
    listing = available_backends(DEVICE)
    for name in ("linear_token_stats", "linear_stepwise_surrogate"):
        assert listing[name].keys() == {"triton", "cpp", "reference"}
        assert listing[name]["triton"] is None and listing[name]["reference"] is None
    linear_token_stats(head.hidden, head.weight, None)
    # The interpreter runs on request only; the compiled library may not have been built.
    on_cpu = "reference" if listing["linear_token_stats"]["cpp"] else "cpp"
    expected = "triton" if DEVICE == "cuda" else on_cpu
    assert last_backend("linear_token_stats") == expected
    with pytest.raises(UnavailableBackendError, match=r"'triton'.*float64"):
        linear_token_stats(head.hidden.double(), head.weight.double(), None, backend="triton")


@pytest.mark.parametrize("dtype", first_fast([torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("optional", first_fast([True, False]))
def test_opcheck_statistics(optional: bool, dtype: torch.dtype) -> None:
    from egspo_kernels.triton_kernels import linear  # registers the operators

    del linear
    head = Head.make(3, 50, dtype, bias=optional)
    targets = head.targets if optional else None
    hidden, weight, *bias = head.operands()
    operands = (hidden, weight, bias[0] if bias else None)
    settings = (0.7, 3 if optional else None, 2, dtype)
    torch.library.opcheck(
        torch.ops.egspo.linear_token_stats.default, (*operands, targets, *settings)
    )
    row = torch.ones(3, device=DEVICE)
    frozen = [None if tensor is None else tensor.detach() for tensor in operands]
    torch.library.opcheck(
        torch.ops.egspo.linear_token_stats_backward.default,
        (
            *(row, None, row if optional else None, *frozen, targets, row, row, row),
            *([True, optional, optional], *settings),
        ),
    )


@pytest.mark.parametrize("kl", first_fast(["exact", "k3", None]))
def test_opcheck_surrogate(kl: str | None) -> None:
    from egspo_kernels.triton_kernels import linear_surrogate  # registers the operators

    del linear_surrogate
    head = Head.make(3, 50, torch.bfloat16, bias=kl is None)
    hidden, weight, *bias = head.operands()
    reference = (head.ref_hidden, head.ref_weight) if kl else (None, None)
    ids = torch.tensor([1, 0, 0], device=DEVICE)
    values = torch.tensor([-8.0, -3.0], device=DEVICE)
    arguments = (
        *(hidden, weight, bias[0] if bias else None, head.targets, ids, values, values),
        *(None, None, *reference, 0.2, 0.3, 0.1 if kl else 0.0, kl, "sum", 0.7, 3, 2),
        torch.bfloat16,
    )
    forward = torch.ops.egspo.linear_stepwise_surrogate.default
    torch.library.opcheck(forward, arguments)
    saved = [tensor.detach() for tensor in forward(*arguments)[7:]]
    exact = reference if kl == "exact" else (None, None)
    frozen = [None if tensor is None else tensor.detach() for tensor in arguments[:3]]
    torch.library.opcheck(
        torch.ops.egspo.linear_stepwise_surrogate_backward.default,
        (
            *(torch.ones((), device=DEVICE), *frozen, head.targets, ids, *exact, saved),
            *([True, True, kl is None], 0.7, 3, 2, torch.bfloat16),
        ),
    )


@pytest.mark.parametrize("backend", first_fast(["reference", "triton"]))
def test_whole_graph(backend: str) -> None:
    torch._dynamo.reset()

    def loss(hidden: Tensor, weight: Tensor, head: Head) -> Tensor:
        stats = linear_token_stats(
            hidden * 2, weight, head.targets, banned_token=3, backend=backend
        )
        value = linear_stepwise_surrogate(
            hidden * 2,
            weight,
            head.targets,
            head.targets % 2,
            stats.log_prob.detach()[:2],
            torch.ones(2, device=hidden.device),
            clip_low=0.2,
            clip_high=0.2,
            kl="exact",
            beta=0.1,
            ref_hidden=head.ref_hidden,
            ref_weight=head.ref_weight,
            backend=backend,
        )
        return value.loss + (stats.entropy * stats.log_prob).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    head = Head.make(4, 50, bias=False)
    hidden, weight = head.operands()
    results = []
    for function in (loss, compiled):
        result = function(hidden, weight, head)
        assert last_backend("linear_token_stats") == backend
        assert last_backend("linear_stepwise_surrogate") == backend
        results.append((result, *torch.autograd.grad(result, (hidden, weight))))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)
