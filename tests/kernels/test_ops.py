"""The operators of the statistics: their registration, and whole-graph compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from egspo_kernels import SampledTokens, TokenStats, last_backend, sample_tokens, token_stats
from tests.helpers.marks import first_fast

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def inputs(rows: int = 4, vocab: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and row ids."""
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocab, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    return logits.to(DEVICE), targets.to(DEVICE), torch.arange(rows, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", first_fast([torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("optional", first_fast([True, False]))
def test_opcheck(backend: str, dtype: torch.dtype, optional: bool) -> None:
    logits, targets, ids = inputs()
    logits = logits.to(dtype)
    rows = torch.tensor([3, 0, 0, 1], device=DEVICE) if optional else None
    banned = 7 if optional else None
    torch.library.opcheck(
        torch.ops.egspo.token_stats.default,
        (logits, targets if optional else None, rows, 0.7, banned, backend),
    )
    torch.library.opcheck(
        torch.ops.egspo.sample_tokens.default,
        (logits, 0.7, -3, 5, ids, banned, 1.0, backend),
    )


def test_opcheck_float64() -> None:
    logits, targets, ids = inputs()
    stats = (logits.double(), targets, None, 1.0, None, "reference")
    torch.library.opcheck(torch.ops.egspo.token_stats.default, stats)
    sample = (logits.double(), 0.0, 0, 0, ids, None, 1.0, "reference")
    torch.library.opcheck(torch.ops.egspo.sample_tokens.default, sample)


def both(
    logits: Tensor, targets: Tensor, ids: Tensor, temperature: float, seed: int, backend: str
) -> tuple[TokenStats, TokenStats, SampledTokens]:
    """A function whose graph must have no break."""
    scaled = logits * 2
    stats = token_stats(scaled, targets, rows=ids.flip(0), temperature=temperature, backend=backend)
    plain = token_stats(scaled, None, banned_token=3, backend=backend)
    sampled = sample_tokens(
        scaled, temperature=temperature, seed=seed, step=2, row_ids=ids, backend=backend
    )
    return stats, plain, sampled


def assert_equal(left: Any, right: Any) -> None:
    for a, b in zip(left, right, strict=True):
        assert type(a) is type(b)
        for x, y in zip(a, b, strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("backend", first_fast(["auto", *BACKENDS]))
@pytest.mark.parametrize("compiler", first_fast(["aot_eager", "eager"]))
def test_whole_graph(backend: str, compiler: str) -> None:
    function = torch.compile(both, fullgraph=True, backend=compiler)
    for rows, temperature, seed in [(4, 0.5, 0), (4, 0.7, 2**63 + 1), (6, 1.0, 5)]:
        arguments = (*inputs(rows), temperature, seed, backend)
        expected = both(*arguments)
        chosen = last_backend("token_stats")
        token_stats(arguments[0].double(), None)  # leaves another backend behind
        assert_equal(function(*arguments), expected)
        assert last_backend("token_stats") == chosen
        assert backend in ("auto", chosen)


def test_gradients_do_not_flow() -> None:
    logits, targets, _ = inputs()
    logits.requires_grad_()
    compiled = torch.compile(token_stats, fullgraph=True, backend="aot_eager")
    assert not compiled(logits, targets).log_prob.requires_grad


def test_shapes_are_still_checked_and_values_are_not() -> None:
    logits, targets, ids = inputs()
    function = torch.compile(token_stats, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="targets must have shape"):
        function(logits, targets[:2])
    if DEVICE == "cpu":
        stats = function(logits, targets, rows=ids + 2, backend="triton")
        assert stats.log_prob.isnan().tolist() == [False, False, True, True]


def test_eager_calls_do_not_go_through_the_dispatcher_of_torch() -> None:
    logits, targets, ids = inputs()
    with torch.profiler.profile() as profile:
        token_stats(logits, targets)
        sample_tokens(logits, temperature=1.0, seed=0, step=0, row_ids=ids)
    assert not [event for event in profile.events() if event.name.startswith("egspo::")]
