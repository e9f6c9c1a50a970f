"""What the launchers would launch, compiled for three architectures without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels import aot, sass, variants
from tests.kernels.aot import Compiled, Target, distinct

triton = pytest.importorskip("triton")

SM_90 = Target("cuda", 90)


@pytest.fixture(scope="module", params=variants.ARCHITECTURES)
def kernels(request: pytest.FixtureRequest) -> list[Compiled]:
    """Every kind of launch at LLaDA's vocabulary."""
    return distinct(variants.kernels(Target("cuda", request.param), variants.ROWS))


def test_what_was_compiled_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    def compile_(question: bytes) -> str:
        asked.append(question)
        return '{"launches": {"stats(2)": []}, "variants": []}'

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(aot, "_compile", compile_)
    for target in (SM_90, SM_90, Target("cuda", 80), SM_90):
        assert aot.compiled(["stats(2)"], target) == {"stats(2)": []}
    assert len(asked) == 2


# Registers of a thread, where they are limited (before sm_100), and for float32.
LIMITS = {"segment_statistics_kernel": (40, 48), "segment_sample_kernel": (48, 48)}


@pytest.mark.slow
def test_segments_are_read_with_wide_loads_and_kept_in_registers(
    kernels: list[Compiled], request: pytest.FixtureRequest
) -> None:
    limited = request.node.callspec.params["kernels"] < 100
    segments = [facts for facts in kernels if facts.kernel in LIMITS]
    assert len(segments) == 8
    for facts in segments:
        assert facts.spills == 0, facts
        single = "*fp32" in facts.arguments.split("partials")[0]
        assert facts.registers <= (LIMITS[facts.kernel][single] if limited else 64), facts
        assert facts.shared <= 96, facts  # six words for each warp: what the reductions exchange
        # Layouts change in the IR, but within a thread: nothing passes between threads in the loop.
        assert sass.exchanges(sass.parse(facts.listing)) == 0, facts
        # Two tiles in the loop: 8 bfloat16 or 4 float32 in a load.
        assert facts.loads["v4.32"] == (4 if single else 2), facts
        # What a segment leaves behind: 4 numbers, or 7.
        assert facts.written in (16, 28), facts


@pytest.mark.slow
def test_rows_are_combined_by_one_warp_without_spills(kernels: list[Compiled]) -> None:
    combining = [facts for facts in kernels if facts.kernel.startswith("row_")]
    assert {facts.kernel for facts in combining} == {"row_statistics_kernel", "row_sample_kernel"}
    for facts in combining:
        assert facts.spills == 0 and facts.shared == 0 and facts.registers <= 64, facts


@pytest.mark.slow
def test_nothing_but_vocabulary_dtype_and_alignment_compiles_again() -> None:
    found = distinct(variants.kernels(SM_90, variants.SAME_ROWS))
    assert sorted(facts.kernel for facts in found) == [
        "row_sample_kernel",
        "row_statistics_kernel",
        "segment_sample_kernel",
        "segment_statistics_kernel",
    ]


@pytest.mark.slow
def test_only_aligned_rows_are_read_with_wide_loads() -> None:
    """And the reader sees spills, with too few registers."""
    *launches, starved = variants.kernels(SM_90, (*variants.WIDE_LOADS, variants.STARVED))
    for (launch, loads), (facts, _) in zip(variants.WIDE_LOADS.items(), launches, strict=True):
        assert facts.kernel == "segment_statistics_kernel"
        assert facts.loads.get("v4.32", 0) == loads, launch
    assert starved[0].kernel == "segment_sample_kernel"
    assert starved[0].spills > 0 and starved[0].registers <= 24
