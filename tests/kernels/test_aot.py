"""What the launchers would launch, compiled for three architectures without a GPU."""

from __future__ import annotations

import pytest

from tests.kernels import sass
from tests.kernels.aot import ARCHITECTURES, Compiled, compiled
from tests.kernels.launches import STATISTICS as LAUNCHES

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest) -> dict[str, Compiled]:
    """Every kind of launch at LLaDA's vocabulary."""
    script = """
stats(2, LLADA)
stats(2, LLADA, torch.float32, picked=True, targets=True)
stats(2, LLADA, torch.float16)
sample(2, LLADA)
sample(2, LLADA, torch.float32, temperature=0.5)
sample(2, LLADA, temperature=0.5, entropy_temperature=0.5)
sample(2, LLADA, temperature=0.5, entropy_temperature=0.7)
sample(2, LLADA, temperature=0.0)
"""
    return compiled(LAUNCHES + script, request.param)


# Registers of a thread, where they are limited: before sm_100.
LIMITS = {"segment_statistics_kernel": 40, "segment_sample_kernel": 48}


def test_segments_are_read_with_wide_loads_and_kept_in_registers(
    kernels: dict[str, Compiled], request: pytest.FixtureRequest
) -> None:
    limited = request.node.callspec.params["kernels"] < 100
    segments = [facts for facts in kernels.values() if facts.kernel in LIMITS]
    assert len(segments) == 8
    for facts in segments:
        assert facts.spills == 0, facts
        assert facts.registers <= (LIMITS[facts.kernel] if limited else 64), facts
        assert facts.shared <= 16, facts  # a word for each warp: what the reductions exchange
        # Layouts change in the IR, but within a thread: nothing passes between threads in the loop.
        assert sass.exchanges(sass.parse(facts.listing)) == 0, facts
        # Two tiles in the loop: 8 bfloat16 or 4 float32 in a load.
        wide = 4 if "*fp32" in facts.arguments.split("partials")[0] else 2
        assert facts.loads["v4.32"] == wide, facts
        # What a segment leaves behind: 4 numbers, or 8.
        assert facts.written in (16, 32), facts


def test_rows_are_combined_by_one_warp_without_spills(kernels: dict[str, Compiled]) -> None:
    combining = [facts for facts in kernels.values() if facts.kernel.startswith("row_")]
    assert {facts.kernel for facts in combining} == {"row_statistics_kernel", "row_sample_kernel"}
    for facts in combining:
        assert facts.spills == 0 and facts.shared == 0 and facts.registers <= 48, facts


def test_nothing_but_vocabulary_dtype_and_alignment_compiles_again() -> None:
    script = """
for n, temperature, banned in [(1, 1.0, None), (16, 0.3, 0), (17, 1.5, 126336), (3, 2.0, 1)]:
    stats(n, LLADA, temperature=temperature, banned=banned)
stats(1, LLADA, stride=LLADA + 16)
stats(1, LLADA, stride=2 * LLADA)
for n, temperature, seed, step, banned in [
    (1, 0.5, 0, 0, None), (16, 0.7, 1, 1, 1), (17, 0.3, 2**63 - 1, 2**32 - 1, 16),
    (2, 0.9, -(2**63), 2**31, 126336),
]:
    sample(n, LLADA, temperature=temperature, seed=seed, step=step, banned=banned)
"""
    assert sorted(compiled(LAUNCHES + script, 90)) == [
        "row_sample_kernel#0",
        "row_statistics_kernel#0",
        "segment_sample_kernel#0",
        "segment_statistics_kernel#0",
    ]


def test_only_aligned_rows_are_read_with_wide_loads() -> None:
    """And the reader sees spills, with too few registers."""
    expected = {
        "stats(2, 8000)": 2,
        "stats(2, 8008)": 2,  # rows aligned to 16 bytes, not to 16 elements
        "stats(2, 8004)": 0,
        "stats(2, 8000, stride=8004)": 0,
        "stats(2, 8000, skip=1, stride=8016)": 0,  # the pointer is not aligned
    }
    starved = "sampling.REGISTERS = 24; sample(2, 8001, temperature=0.5)"
    variants = compiled(LAUNCHES + "\n".join([*expected, starved]), 90)
    for number, (launch, loads) in enumerate(expected.items()):
        facts = variants[f"segment_statistics_kernel#{number}"]
        assert facts.loads.get("v4.32", 0) == loads, launch
    facts = variants["segment_sample_kernel#0"]
    assert facts.spills > 0 and facts.registers <= 24
