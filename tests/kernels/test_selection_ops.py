"""The operators of the selector: their registration, and whole-graph compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from egspo_kernels import last_backend, select_steps, select_steps_segmented

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def inputs(rows: int = 4, steps: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Entropies, limits and step ids."""
    generator = torch.Generator().manual_seed(rows)
    entropy = torch.rand(rows, steps, generator=generator)
    limits = torch.randint(steps + 1, (rows,), generator=generator)
    step_ids = torch.randint(-1, 5, (rows, steps), generator=generator)
    return entropy.to(DEVICE), limits.to(DEVICE), step_ids.to(DEVICE)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limited", [False, True])
def test_opcheck(backend: str, dtype: torch.dtype, limited: bool) -> None:
    entropy, limits, step_ids = inputs()
    given = limits if limited else None
    torch.library.opcheck(
        torch.ops.egspo.select_steps.default, (entropy.to(dtype), 3, given, backend)
    )
    clamped = limits.clamp(max=5).int() if limited else None
    torch.library.opcheck(
        torch.ops.egspo.select_steps_segmented.default,
        (entropy.to(dtype), step_ids, 5, 3, "sum", clamped, backend),
    )


def both(entropy: Tensor, limits: Tensor, step_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    selected = select_steps(entropy * 2, k, limits=limits)
    return selected + 1, select_steps_segmented(entropy, step_ids, 5, k, reduce="sum")


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_whole_graph(compiler: str) -> None:
    function = torch.compile(both, fullgraph=True, backend=compiler)
    for rows, k in [(4, 3), (6, 3), (6, 2)]:
        expected = both(*inputs(rows), k)
        chosen = last_backend("select_steps")
        select_steps(inputs()[0], 1, backend="reference")
        assert all(map(torch.equal, function(*inputs(rows), k), expected))
        assert last_backend("select_steps") == chosen


def test_gradients_do_not_flow() -> None:
    entropy, *_ = inputs()
    entropy.requires_grad_()
    compiled = torch.compile(lambda x: select_steps(x, 2) * x.sum(), backend="aot_eager")
    compiled(entropy).sum().backward()
    expected = float(select_steps(entropy, 2).sum())
    assert torch.equal(entropy.grad, torch.full_like(entropy, expected))


def test_shapes_are_still_checked() -> None:
    entropy, limits, _ = inputs()
    compiled = torch.compile(select_steps, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="limits must have shape"):
        compiled(entropy, 2, limits=limits[:2])


def test_eager_calls_do_not_go_through_the_dispatcher_of_torch() -> None:
    arguments = inputs()
    with torch.profiler.profile() as profile:
        both(*arguments, 2)
    assert not [event for event in profile.events() if event.name.startswith("egspo::")]
