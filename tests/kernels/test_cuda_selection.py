"""The CUDA selector on a GPU: the results of the CPU, on the stream of the caller, unwaited for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from egspo_kernels import last_backend, select_steps, select_steps_segmented

pytestmark = pytest.mark.gpu

NAN, INF = math.nan, math.inf
SPECIAL = torch.tensor([0.0, -0.0, 1.0, 1.5, -1.0, INF, -INF, NAN], dtype=torch.float64)


def entropies(kind: str, rows: int, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows + steps)
    if kind == "special":
        values = SPECIAL[torch.randint(len(SPECIAL), (rows, steps), generator=generator)]
    elif kind == "ascending":  # every step beats those before it
        values = torch.arange(steps).expand(rows, steps)
    elif kind == "equal":
        values = torch.full((rows, steps), 0.25)
    else:
        values = torch.rand(rows, steps, generator=generator, dtype=torch.float64) * 12
        values = values.round() if kind == "ties" else values
    return values.to(dtype)


def assert_like_cpu(entropy: Tensor, k: int, limits: Tensor | None = None) -> None:
    on_gpu = None if limits is None else limits.cuda()
    selected = select_steps(entropy.cuda(), k, limits=on_gpu)
    assert last_backend("select_steps") == "cuda"
    expected = select_steps(entropy, k, limits=limits)
    assert last_backend("select_steps") in ("cpp", "reference")
    assert torch.equal(selected.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "ties", "special", "ascending", "equal"])
@pytest.mark.parametrize("steps", [1, 31, 32, 33, 256, 1023, 1024, 1025, 2047, 2049, 5000])
def test_steps(dtype: torch.dtype, kind: str, steps: int) -> None:
    entropy = entropies(kind, 5, steps, dtype)
    limits = torch.randint(steps + 1, (5,), generator=torch.Generator().manual_seed(steps))
    for k in sorted({0, 1, min(8, steps), steps // 2, steps}):
        assert_like_cpu(entropy, k)
        assert_like_cpu(entropy, k, limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "ascending", "equal"])
def test_longest_rows(dtype: torch.dtype, kind: str) -> None:
    entropy = entropies(kind, 3, 65_536, dtype)
    for k in (8, 1025, 65_536):
        assert_like_cpu(entropy, k, torch.tensor([65_536, 65_535, 3000]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize(
    ("tokens", "steps"), [(0, 3), (1, 1), (256, 128), (1000, 7), (3000, 2500), (65_536, 65_536)]
)
def test_tokens(dtype: torch.dtype, reduce: str, tokens: int, steps: int) -> None:
    """Sums in another order than the CPU's would change choices among so many."""
    for kind in ("random", "special"):
        values = entropies(kind, 4, tokens, dtype)
        generator = torch.Generator().manual_seed(tokens)
        step_ids = torch.randint(-1, steps, (4, tokens), generator=generator)
        limits = torch.randint(steps + 1, (4,), generator=generator)
        for k in (min(8, steps), steps):
            selected = select_steps_segmented(
                *(values.cuda(), step_ids.cuda(), steps, k), reduce=reduce, limits=limits.cuda()
            )
            assert last_backend("select_steps_segmented") == "cuda"
            expected = select_steps_segmented(
                values, step_ids, steps, k, reduce=reduce, limits=limits
            )
            assert torch.equal(selected.cpu(), expected)


def test_out_of_range_limits_and_step_ids_are_as_documented() -> None:
    entropy = entropies("random", 4, 100)
    limits = torch.tensor([-(2**63), -1, 101, 2**63 - 1])
    clamped = select_steps(entropy, 5, limits=limits.clamp(0, 100))
    assert torch.equal(select_steps(entropy.cuda(), 5, limits=limits.cuda()).cpu(), clamped)
    step_ids = torch.arange(100).expand(4, 100).clone()
    step_ids[:, ::3] = torch.tensor([-(2**63), -2, 50, 2**63 - 1]).unsqueeze(1)
    ignored = step_ids.masked_fill((step_ids < 0) | (step_ids >= 50), -1)
    selected = select_steps_segmented(entropy.cuda(), step_ids.cuda(), 50, 5)
    assert torch.equal(selected.cpu(), select_steps_segmented(entropy, ignored, 50, 5))


@pytest.mark.parametrize("steps", [256, 3000])
def test_memory_layout_does_not_matter(steps: int) -> None:
    wide = entropies("random", 8, 2 * steps)
    for entropy in (
        wide[::2, :steps],
        wide[:, ::2],
        wide[:4].t()[:steps].t(),
        wide[:1].expand(3, -1),
    ):
        assert torch.equal(select_steps(entropy.cuda(), 8).cpu(), select_steps(entropy, 8))
        view = wide.cuda().as_strided(entropy.shape, entropy.stride(), entropy.storage_offset())
        assert torch.equal(select_steps(view, 8).cpu(), select_steps(entropy, 8))


def both(entropy: Tensor, limits: Tensor, step_ids: Tensor) -> tuple[Tensor, Tensor]:
    selected = select_steps(entropy, 8, limits=limits)
    return selected, select_steps_segmented(entropy, step_ids, 64, 8)


def arguments(steps: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    limits = torch.randint(steps + 1, (64,), generator=generator)
    step_ids = torch.randint(-1, 64, (64, steps), generator=generator)
    return entropies("special", 64, steps), limits, step_ids


def on_gpu() -> tuple[Tensor, ...]:
    return tuple(tensor.cuda() for tensor in arguments())


def assert_all_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_no_synchronisation() -> None:
    inputs = on_gpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = both(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_all_equal(found, both(*arguments()))


@pytest.mark.parametrize(
    "function",
    [
        lambda entropy, limits, ids: select_steps(entropy, 8, limits=limits),
        lambda entropy, limits, ids: select_steps_segmented(entropy, ids, 64, 8),
    ],
)
def test_one_launch(function: Callable[..., Tensor]) -> None:
    inputs = on_gpu()
    function(*inputs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(*inputs)
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    work = [event.name for event in profile.events() if event.device_type == device]
    assert len(work) == 1
    assert "select" in work[0]


def test_runs_on_the_stream_of_the_caller() -> None:
    inputs = on_gpu()
    late = torch.zeros_like(inputs[0])
    both(late, *inputs[1:])  # loads the kernels
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms: a launch on another stream would be too early
        late.copy_(inputs[0])
        found = both(late, *inputs[1:])
    assert not stream.query(), "the calls waited, or the GPU was too fast for this test"
    stream.synchronize()
    assert_all_equal(found, both(*arguments()))


def test_graph_capture() -> None:
    inputs = on_gpu()
    static = torch.zeros_like(inputs[0])
    both(static, *inputs[1:])  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both(static, *inputs[1:])
    static.copy_(inputs[0])
    graph.replay()
    assert_all_equal(found, both(*arguments()))


def test_run_to_run() -> None:
    entropy, step_ids = entropies("random", 64, 5000).cuda(), arguments(5000)[2].cuda()
    first = both(entropy, torch.full((64,), 5000).cuda(), step_ids)
    for _ in range(20):
        again = both(entropy, torch.full((64,), 5000).cuda(), step_ids)
        assert all(map(torch.equal, first, again))


def test_compiled_graph() -> None:
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_all_equal(compiled(*on_gpu()), both(*arguments()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_the_tensors() -> None:
    inputs = [tensor.to("cuda:1") for tensor in arguments()]
    with torch.cuda.device(0):
        found = both(*inputs)
    assert all(tensor.device == torch.device("cuda:1") for tensor in found)
    assert_all_equal(found, both(*arguments()))
