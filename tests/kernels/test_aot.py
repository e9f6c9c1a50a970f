"""What the launchers would launch, compiled for three architectures without a GPU."""

from __future__ import annotations

import pytest

from tests.kernels.aot import ARCHITECTURES, Compiled, compiled
from tests.kernels.launches import STATISTICS as LAUNCHES

pytest.importorskip("triton")


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


THREADS = 256  # of a program
# Registers for each of them (a processor has 65,536: four programs, or two), logits for each
# thread, and instructions for each logit, of which 2 run only in the block of a banned token. An
# H200 has 12 to 15 for each bfloat16 logit at the speed of its memory: sampling is bound by them.
LIMITS = {"block_statistics_kernel": (64, 32, 18.5), "block_sample_kernel": (102, 16, 105)}


def test_blocks_are_read_with_wide_loads_and_kept_in_registers(
    kernels: dict[str, Compiled],
) -> None:
    blocks = [facts for facts in kernels.values() if facts.kernel in LIMITS]
    assert len(blocks) == 8
    for facts in blocks:
        registers, logits, instructions = LIMITS[facts.kernel]
        assert facts.spills == 0, facts
        assert facts.registers <= registers, facts
        assert 100 < facts.instructions <= instructions * logits, facts
        assert facts.shared <= 128, facts  # a word for each warp: what the reductions exchange
        assert facts.conversions == 0, facts
        # 8 bfloat16 or 4 float32 in a load; the other loads are row indices.
        wide = 4 if "*fp32" in facts.arguments.split("partials")[0] else 8
        assert facts.loads.pop("v4.32") == logits // wide, facts
        assert set(facts.loads) <= {"64"}, facts
        # Each logit once, and what a block leaves behind: 4 numbers, or 7.
        assert 0 <= facts.read - THREADS * logits * (16 // wide) <= 16, facts
        assert facts.written in (16, 28) and facts.loops == 0, facts


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
        "block_sample_kernel#0",
        "block_statistics_kernel#0",
        "row_sample_kernel#0",
        "row_statistics_kernel#0",
    ]


def test_loads_are_as_wide_as_the_alignment_of_the_rows() -> None:
    """And the reader sees narrow loads and spills, with too few registers, where there are any."""
    expected = {
        "stats(2, 8000)": {"v4.32": 4},
        "stats(2, 8008)": {"v4.32": 4},  # rows aligned to 16 bytes, not to 16 elements
        "stats(2, 8004)": {"v2.32": 8},
        "stats(2, 8000, stride=8004)": {"v2.32": 8},
        "stats(2, 8001)": {"16": 32},
        "stats(2, 8000, skip=1, stride=8016)": {"16": 32},  # the pointer is not aligned
    }
    starved = "rows.OPTIONS['maxnreg'] = 24; sample(2, 8001, temperature=0.5)"
    variants = compiled(LAUNCHES + "\n".join([*expected, starved]), 90)
    for number, (launch, loads) in enumerate(expected.items()):
        assert variants[f"block_statistics_kernel#{number}"].loads == loads, launch
    facts = variants["block_sample_kernel#0"]
    assert facts.spills > 0 and facts.registers <= 24 and facts.loads["16"] == 16
