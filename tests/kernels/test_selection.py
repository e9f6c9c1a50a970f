from __future__ import annotations

import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from egspo_kernels import (
    UnavailableBackendError,
    last_backend,
    select_steps,
    select_steps_segmented,
)
from egspo_kernels.dispatch import extension

HAS_LIBRARY = not isinstance(extension.cpu_library(), str)
NAN, INF = math.nan, math.inf

needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="the C++ library was not built")
backends = pytest.mark.parametrize(
    "backend", [pytest.param("cpp", marks=needs_library), "reference"]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

# Few values, so that ties are common, next to arbitrary ones.
VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.5, -1.0, INF, -INF, NAN]) | st.floats(width=32)


def best_steps(values: list[float | None], k: int) -> list[int]:
    """The specification: None is no candidate, NaN ranks last, ties go to the earlier step."""
    candidates = [(step, value) for step, value in enumerate(values) if value is not None]
    numbers = [(step, value) for step, value in candidates if not math.isnan(value)]
    numbers.sort(key=lambda pair: -pair[1])  # a stable sort
    nans = [(step, value) for step, value in candidates if math.isnan(value)]
    return ([step for step, _ in numbers + nans] + [-1] * k)[:k]


@st.composite
def step_cases(draw: st.DrawFn) -> tuple[list[list[float]], int, list[int] | None]:
    steps = draw(st.integers(0, 12))
    rows = draw(st.lists(st.lists(VALUES, min_size=steps, max_size=steps), max_size=4))
    limits = st.lists(st.integers(0, steps), min_size=len(rows), max_size=len(rows))
    return rows, draw(st.integers(0, steps)), draw(st.none() | limits)


@backends
@dtypes
@given(case=step_cases())
def test_selection_is_a_stable_sort(
    backend: str, dtype: torch.dtype, case: tuple[list[list[float]], int, list[int] | None]
) -> None:
    rows, k, limits = case
    entropy = torch.tensor(rows, dtype=dtype) if rows else torch.empty(0, k, dtype=dtype)
    selected = select_steps(
        entropy, k, limits=None if limits is None else torch.tensor(limits).long(), backend=backend
    )
    assert last_backend("select_steps") == backend
    expected = [
        best_steps([*row[:limit]], k)
        for row, limit in zip(rows, limits or [len(row) for row in rows], strict=True)
    ]
    assert selected.dtype == torch.int64
    assert selected.shape == (len(rows), k)
    assert selected.tolist() == expected


@st.composite
def segment_cases(draw: st.DrawFn) -> tuple[list[list[tuple[float, int]]], int, int, list[int]]:
    steps, tokens = draw(st.integers(0, 6)), draw(st.integers(0, 12))
    token = st.tuples(VALUES, st.integers(-1, steps - 1))
    rows = draw(st.lists(st.lists(token, min_size=tokens, max_size=tokens), max_size=4))
    limits = st.lists(st.integers(0, steps), min_size=len(rows), max_size=len(rows))
    return rows, steps, draw(st.integers(0, steps)), draw(limits)


def step_entropies(row: list[tuple[float, int]], steps: int, reduce: str) -> list[float | None]:
    entropies: list[float | None] = []
    for step in range(steps):
        values = [value for value, token_step in row if token_step == step]
        total = 0.0
        for value in values:  # not sum(): it compensates, from Python 3.12 on
            total += value
        divisor = len(values) if reduce == "mean" else 1
        entropies.append(total / divisor if values else None)
    return entropies


@backends
@dtypes
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@given(case=segment_cases())
def test_segmented_selection_reduces_then_sorts(
    backend: str,
    dtype: torch.dtype,
    reduce: str,
    case: tuple[list[list[tuple[float, int]]], int, int, list[int]],
) -> None:
    rows, steps, k, limits = case
    tokens = len(rows[0]) if rows else 3
    pairs = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), tokens, 2)
    selected = select_steps_segmented(
        pairs[..., 0].to(dtype),
        pairs[..., 1].to(torch.int16),
        steps,
        k,
        reduce=reduce,
        limits=torch.tensor(limits, dtype=torch.int32),
        backend=backend,
    )
    assert last_backend("select_steps_segmented") == backend
    expected = [
        best_steps(step_entropies(row, steps, reduce)[:limit], k)
        for row, limit in zip(rows, limits, strict=True)
    ]
    assert selected.shape == (len(rows), k)
    assert selected.tolist() == expected


@backends
def test_documented_order(backend: str) -> None:
    entropy = torch.tensor([[NAN, 0.0, -INF, 2.0, -0.0, INF, NAN, 2.0]])
    selected = select_steps(entropy, 8, backend=backend)
    assert selected.tolist() == [[5, 3, 7, 1, 4, 2, 0, 6]]
    limited = select_steps(entropy, 4, limits=torch.tensor([3]), backend=backend)
    assert limited.tolist() == [[1, 2, 0, -1]]


@backends
def test_a_step_of_nan_is_a_candidate_and_a_step_without_tokens_is_not(backend: str) -> None:
    token_entropy = torch.tensor([[NAN, 1.0, 9.0]])
    step_ids = torch.tensor([[3, 2, -1]])  # steps 0 and 1 have no token
    selected = select_steps_segmented(token_entropy, step_ids, 4, 3, backend=backend)
    assert selected.tolist() == [[2, 3, -1]]


@backends
def test_mean_and_sum_rank_differently(backend: str) -> None:
    token_entropy = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    step_ids = torch.tensor([[0, 0, 0, 1]])
    by = {
        reduce: select_steps_segmented(
            token_entropy, step_ids, 2, 1, reduce=reduce, backend=backend
        ).item()
        for reduce in ("mean", "sum")
    }
    assert by == {"mean": 1, "sum": 0}


@needs_library
def test_backends_agree_at_full_size() -> None:
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(64, 256, generator=generator).mul(50).round()  # many ties
    limits = torch.randint(0, 257, (64,), generator=generator)
    step_ids = torch.randint(-1, 128, (64, 256), generator=generator)
    for k in (1, 8, 100):
        for name, function in {
            "select_steps": lambda backend, k=k: select_steps(
                entropy, k, limits=limits, backend=backend
            ),
            "select_steps_segmented": lambda backend, k=k: select_steps_segmented(
                entropy, step_ids, 128, k, limits=limits.clamp(max=128), backend=backend
            ),
        }.items():
            assert torch.equal(function("cpp"), function("reference")), (name, k)


@needs_library
def test_automatic_choice_is_cpp() -> None:
    select_steps(torch.rand(2, 4), 2)
    select_steps_segmented(torch.rand(2, 4), torch.zeros(2, 4, dtype=torch.int64), 3, 2)
    assert last_backend("select_steps") == last_backend("select_steps_segmented") == "cpp"


def layouts(entropy: Tensor) -> dict[str, Tensor]:
    """The same values in different memory."""
    wide = torch.full((2 * len(entropy), 2 * entropy.shape[1]), 99.0)
    wide[::2, : entropy.shape[1]] = entropy
    inner = wide.clone()
    inner[::2, ::2] = entropy
    return {
        "row stride": wide[::2, : entropy.shape[1]],
        "inner stride": inner[::2, ::2],
        "transposed": entropy.t().contiguous().t(),
        "requires grad": entropy.clone().requires_grad_(),
    }


@backends
def test_memory_layout_does_not_matter(backend: str) -> None:
    entropy = torch.rand(5, 7, generator=torch.Generator().manual_seed(1))
    step_ids = torch.arange(7).expand(5, 7)  # row stride 0
    limits = torch.tensor([7, 9, 3, 9, 0, 9, 7, 9, 1])[::2]
    expected = select_steps(entropy, 4, limits=limits.contiguous(), backend=backend)
    for name, view in layouts(entropy).items():
        assert torch.equal(select_steps(view, 4, limits=limits, backend=backend), expected), name
        segmented = select_steps_segmented(view, step_ids, 7, 4, limits=limits, backend=backend)
        assert torch.equal(segmented, expected), name
    shared = entropy[:1].expand(3, 7)
    assert len(set(map(tuple, select_steps(shared, 4, backend=backend).tolist()))) == 1


@backends
@pytest.mark.parametrize(("rows", "steps", "k"), [(0, 5, 3), (3, 0, 0), (3, 5, 0), (0, 0, 0)])
def test_empty_shapes(backend: str, rows: int, steps: int, k: int) -> None:
    assert select_steps(torch.empty(rows, steps), k, backend=backend).shape == (rows, k)
    no_tokens = torch.empty(rows, 0)
    segmented = select_steps_segmented(
        no_tokens, no_tokens.long(), steps, min(steps, k + 1), backend=backend
    )
    assert segmented.tolist() == [[-1] * min(steps, k + 1)] * rows


@needs_library
def test_concurrent_calls_do_not_interfere() -> None:
    inputs = [
        torch.rand(16, 200, generator=torch.Generator().manual_seed(seed)) for seed in range(8)
    ]
    expected = [select_steps(entropy, 8, backend="reference") for entropy in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            results = pool.map(lambda entropy: select_steps(entropy, 8, backend="cpp"), inputs)
            assert all(map(torch.equal, results, expected))


ENTROPY = torch.zeros(2, 4)
IDS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"entropy": [[1.0]]}, TypeError, "entropy must be a tensor, got list"),
        ({"entropy": torch.zeros(4)}, ValueError, r"entropy must have 2 dimensions.*\(4,\)"),
        ({"entropy": IDS}, TypeError, "entropy must be floating point, got torch.int64"),
        ({"entropy": ENTROPY.bfloat16()}, TypeError, "float64, got torch.bfloat16: rounded to 16"),
        ({"entropy": ENTROPY.half()}, TypeError, "float64, got torch.float16: rounded to 16"),
        ({"k": 5}, ValueError, "k must be at most the number of steps, 4, got 5"),
        ({"k": -1}, ValueError, "k must be >= 0, got -1"),
        ({"k": 2.0}, TypeError, r"k must be an int, got .* \(float\)"),
        ({"limits": [4, 4]}, TypeError, "limits must be a tensor, got list"),
        ({"limits": torch.tensor([4])}, ValueError, r"limits must have shape \(2,\), got \(1,\)"),
        ({"limits": torch.tensor([4.0, 4.0])}, TypeError, "limits must be int64 or int32"),
        ({"limits": torch.tensor([5, 0])}, ValueError, r"limits must lie in \[0, 5\).*\[0, 5\]"),
        ({"limits": torch.tensor([0, -1])}, ValueError, r"limits must lie in \[0, 5\).*\[-1, 0\]"),
        ({"limits": torch.tensor([0, 0], device="meta")}, ValueError, "limits is on meta"),
        ({"backend": "cuda"}, UnavailableBackendError, "select_steps: backend 'cuda'"),
        ({"backend": "best"}, ValueError, "backend must be 'auto' or one of"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select_steps(**{"entropy": ENTROPY, "k": 2, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"token_entropy": ENTROPY.half()}, TypeError, "token_entropy must be float32 or float64"),
        ({"step_ids": [[0]]}, TypeError, "step_ids must be a tensor, got list"),
        ({"step_ids": IDS[:1]}, ValueError, r"step_ids must have the shape .*\(2, 4\), got \(1, 4"),
        ({"step_ids": IDS.float()}, TypeError, "step_ids must be int64, int32 or int16"),
        ({"step_ids": IDS + 3}, ValueError, r"step_ids must lie in \[-1, 3\).*\[3, 3\]"),
        ({"step_ids": IDS - 2}, ValueError, r"step_ids must lie in \[-1, 3\).*\[-2, -2\]"),
        ({"step_ids": IDS.to("meta")}, ValueError, "step_ids is on meta, expected cpu"),
        ({"num_steps": -1}, ValueError, "num_steps must be >= 0, got -1"),
        ({"num_steps": 3.0}, TypeError, r"num_steps must be an int, got 3.0 \(float\)"),
        ({"k": 4}, ValueError, "k must be at most the number of steps, 3, got 4"),
        ({"reduce": "max"}, ValueError, r"reduce must be one of \('sum', 'mean'\), got 'max'"),
        ({"limits": torch.tensor([4, 0])}, ValueError, r"limits must lie in \[0, 4\)"),
    ],
)
def test_bad_segmented_arguments(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    good = {"token_entropy": ENTROPY, "step_ids": IDS, "num_steps": 3, "k": 2}
    with pytest.raises(error, match=message):
        select_steps_segmented(**{**good, **arguments})  # type: ignore[arg-type]


def test_cpp_refuses_other_devices() -> None:
    with pytest.raises(UnavailableBackendError, match="'cpp' cannot run on meta: runs on CPU"):
        select_steps(ENTROPY.to("meta"), 2, backend="cpp")


def test_without_the_library_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "cpu_library", lambda: "it was not built")
    monkeypatch.setattr("egspo_kernels.selection._SELECT_STEPS._chosen", {})
    assert select_steps(torch.tensor([[1.0, 2.0]]), 1).tolist() == [[1]]
    assert last_backend("select_steps") == "reference"
    with pytest.raises(UnavailableBackendError, match="it was not built"):
        select_steps(ENTROPY, 2, backend="cpp")
    with pytest.raises(RuntimeError, match="it was not built"):
        extension.call("egspo_select_steps_f32")


def test_missing_library_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"libegspo_cpu\.so was not built.*EGSPO_REQUIRE_EXTENSION"):
        extension.load_library(tmp_path / "libegspo_cpu.so")


@needs_library
def test_file_that_is_no_library_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "libegspo_cpu.so"
    path.write_text("not a library")
    with pytest.raises(OSError, match="libegspo_cpu"):
        extension.load_library(path)


@needs_library
def test_library_of_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_ABI_VERSION", 0)
    with pytest.raises(OSError, match="ABI version 1, expected 0: reinstall"):
        extension.load_library(extension.LIBRARY_PATH)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_library_without_the_functions_is_refused(tmp_path: Path) -> None:
    source, library = tmp_path / "other.cpp", tmp_path / "other.so"
    source.write_text('extern "C" int egspo_abi_version() { return 1; }')
    command = ["c++", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True, timeout=60)
    with pytest.raises(OSError, match="lacks a function"):
        extension.load_library(library)


@needs_library
class TestPlainInterface:
    """The C functions protect themselves, whatever Python checked before."""

    entropy = torch.tensor([[3.0, 1.0, 2.0]])
    ids = torch.tensor([[0, 1, 2]])

    def select(self, **changes: Tensor | int | None) -> list[list[int]]:
        selected = torch.full((1, 3), 7)
        arguments: dict[str, Tensor | int | None] = {
            "entropy": self.entropy,
            "batch": 1,
            "steps": 3,
            "row_stride": 3,
            "limits": None,
            "k": 3,
            "indices": selected,
        }
        extension.call("egspo_select_steps_f32", *{**arguments, **changes}.values())
        return selected.tolist()

    def select_segmented(self, **changes: Tensor | int | None) -> list[list[int]]:
        selected = torch.full((1, 3), 7)
        arguments: dict[str, Tensor | int | None] = {
            "token_entropy": self.entropy,
            "step_ids": self.ids,
            "batch": 1,
            "tokens": 3,
            "row_stride": 3,
            "steps": 3,
            "reduce": 0,
            "limits": None,
            "k": 3,
            "indices": selected,
        }
        extension.call("egspo_select_steps_segmented_f32", *{**arguments, **changes}.values())
        return selected.tolist()

    def test_good_arguments(self) -> None:
        assert self.select() == self.select_segmented() == [[0, 2, 1]]

    @pytest.mark.parametrize(("limit", "expected"), [(-5, [-1, -1, -1]), (2**62, [0, 2, 1])])
    def test_limits_are_clamped(self, limit: int, expected: list[int]) -> None:
        limits = torch.tensor([limit])
        assert self.select(limits=limits) == self.select_segmented(limits=limits) == [expected]

    def test_step_ids_out_of_range_are_ignored(self) -> None:
        ids = torch.tensor([[-(2**63), 1, 2**63 - 1]])
        assert self.select_segmented(step_ids=ids) == [[1, -1, -1]]

    @pytest.mark.parametrize("name", ["batch", "row_stride", "k", "steps"])
    @pytest.mark.parametrize("value", [-1, 2**62])
    def test_impossible_sizes(self, name: str, value: int) -> None:
        # A single row may have any stride: more rows make it matter.
        rows: dict[str, Tensor | int | None] = {"batch": 3} if name == "row_stride" else {}
        with pytest.raises(RuntimeError, match="egspo_select_steps_f32 failed: invalid argument"):
            self.select(**rows, **{name: value})
        with pytest.raises(RuntimeError, match="failed: invalid argument"):
            self.select_segmented(**rows, **{name: value})

    def test_impossible_tokens_and_reduction(self) -> None:
        for changes in ({"tokens": -1}, {"tokens": 2**62}, {"reduce": 2}, {"step_ids": None}):
            with pytest.raises(RuntimeError, match="invalid argument"):
                self.select_segmented(**changes)

    @pytest.mark.parametrize("function", ["select", "select_segmented"])
    def test_null_arrays(self, function: str) -> None:
        name = "entropy" if function == "select" else "token_entropy"
        for changes in ({name: None}, {"indices": None}):
            with pytest.raises(RuntimeError, match="invalid argument"):
                getattr(self, function)(**changes)

    def test_more_steps_than_memory(self) -> None:
        with pytest.raises(RuntimeError, match="out of memory"):
            self.select_segmented(steps=2**59)
