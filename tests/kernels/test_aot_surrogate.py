"""What the surrogate would launch, compiled for three architectures without a GPU."""

from __future__ import annotations

import re

import pytest

from tests.kernels.aot import ARCHITECTURES, Compiled, compiled
from tests.kernels.launches import SURROGATE as LAUNCHES

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest) -> dict[str, Compiled]:
    """Every kind of launch at LLaDA's vocabulary."""
    script = "\n".join(
        f"statistics_gradient({dtype})\n"
        + "\n".join(f"stepwise(2, 2, {kl!r}, {dtype})" for kl in (None, "k3", "exact"))
        for dtype in ("torch.bfloat16", "torch.float32")
    )
    return compiled(LAUNCHES + script, request.param)


# Registers of a thread, and logits of a row that it takes at once.
LIMITS = {"segment_kl_kernel": (48, 8), "row_gradient_kernel": (80, 16)}


def test_logits_move_in_wide_accesses_and_stay_in_registers(
    kernels: dict[str, Compiled], request: pytest.FixtureRequest
) -> None:
    capability = request.node.callspec.params["kernels"]
    passes = [facts for facts in kernels.values() if facts.kernel in LIMITS]
    assert len(passes) == 8
    for facts in passes:
        registers, logits = LIMITS[facts.kernel]
        if capability == 80 and facts.kernel == "segment_kl_kernel":
            registers = 64  # with 48 as on the others the compiler spills 48 bytes
        assert facts.spills == 0, facts
        assert facts.registers <= registers, facts
        assert facts.shared <= 128, facts  # a word for each warp: what the reductions exchange
        assert facts.conversions == 0, facts
        # 8 bfloat16 or 4 float32 in an access; the others are indices and numbers of the row.
        dtype = re.search(r"'logits': '\*(\w+)'", facts.arguments)
        assert dtype is not None
        wide = logits // (4 if dtype[1] == "fp32" else 8)
        two_rows = re.search(r"'ref_logits': '\*", facts.arguments) is not None
        assert facts.loads["v4.32"] == wide * (2 if two_rows else 1), facts
        if facts.kernel == "row_gradient_kernel":
            # Zeros are written by a branch of their own.
            assert facts.stores == {"v4.32": 2 * wide} and facts.loops == 0, facts


def test_small_kernels_do_not_spill(kernels: dict[str, Compiled]) -> None:
    limits = {
        "row_normaliser_kernel": 32,
        "row_kl_kernel": 32,
        "step_kernel": 128,
        "total_kernel": 48,
    }
    assert {facts.kernel for facts in kernels.values()} - LIMITS.keys() == {
        *limits,
        "segment_statistics_kernel",
    }
    for facts in kernels.values():
        if facts.kernel in limits:
            assert facts.spills == 0 and facts.registers <= limits[facts.kernel], facts
            assert facts.shared <= 256, facts


def test_nothing_but_vocabulary_dtype_alignment_and_objective_compiles_again() -> None:
    script = """
for n, steps, temperature, banned, clips, beta, skip in [
    (1, 1, 1.0, None, (0, 0), 1, 0), (16, 16, 0.3, 0, (0.2, 1), 0.1, 1),
    (17, 33, 1.5, 126336, (1, 7.5), 1e-9, 2), (3, 1000, 2.0, 1, (0.1, 0.2), 16, 3),
]:
    stepwise(n, steps, "exact", temperature=temperature, banned=banned, clips=clips, beta=beta,
             skip=skip)
stepwise(1, 1, "exact", stride=LLADA + 16)
"""
    assert sorted(compiled(LAUNCHES + script, 90)) == [
        "row_gradient_kernel#0",
        "row_kl_kernel#0",
        "segment_kl_kernel#0",
        "step_kernel#0",
        "total_kernel#0",
    ]


def test_accesses_are_as_wide_as_the_alignment_of_the_rows() -> None:
    script = """
statistics_gradient(torch.bfloat16, 8004)
statistics_gradient(torch.bfloat16, 8001)
statistics_gradient(torch.bfloat16, 8000, 8001)
"""
    variants = compiled(LAUNCHES + script, 90)
    assert [facts.kernel for facts in variants.values()] == ["row_gradient_kernel"] * 3
    assert [facts.stores for facts in variants.values()] == [{"v2.32": 8}, {"16": 32}, {"v4.32": 4}]
    assert [facts.loads.get("16", 0) for facts in variants.values()] == [0, 16, 16]
