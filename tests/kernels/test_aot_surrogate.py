"""What the surrogate would launch, compiled for three architectures without a GPU."""

from __future__ import annotations

import re

import pytest

from tests.kernels import variants
from tests.kernels.aot import Compiled, Target, distinct

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SM_90 = Target("cuda", 90)


@pytest.fixture(scope="module", params=variants.ARCHITECTURES)
def kernels(request: pytest.FixtureRequest) -> list[Compiled]:
    """Every kind of launch at LLaDA's vocabulary."""
    return distinct(variants.kernels(Target("cuda", request.param), variants.SURROGATES))


# Registers of a thread, and logits of a row that it takes at once.
LIMITS = {"segment_kl_kernel": (48, 8), "row_gradient_kernel": (80, 16)}


def test_logits_move_in_wide_accesses_and_stay_in_registers(
    kernels: list[Compiled],
) -> None:
    passes = [facts for facts in kernels if facts.kernel in LIMITS]
    assert len(passes) == 8
    for facts in passes:
        registers, logits = LIMITS[facts.kernel]
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


def test_small_kernels_do_not_spill(kernels: list[Compiled]) -> None:
    limits = {
        "row_normaliser_kernel": 32,
        "row_kl_kernel": 32,
        "step_kernel": 128,
        "total_kernel": 48,
    }
    assert {facts.kernel for facts in kernels} - LIMITS.keys() == {
        *limits,
        "segment_statistics_kernel",
    }
    for facts in kernels:
        if facts.kernel in limits:
            assert facts.spills == 0 and facts.registers <= limits[facts.kernel], facts
            assert facts.shared <= 256, facts


def test_nothing_but_vocabulary_dtype_alignment_and_objective_compiles_again() -> None:
    found = distinct(variants.kernels(SM_90, variants.SAME_SURROGATES))
    assert sorted(facts.kernel for facts in found) == [
        "row_gradient_kernel",
        "row_kl_kernel",
        "segment_kl_kernel",
        "step_kernel",
        "total_kernel",
    ]


def test_accesses_are_as_wide_as_the_alignment_of_the_rows() -> None:
    launches = variants.kernels(SM_90, list(variants.GRADIENTS))
    for (stores, loads), (facts,) in zip(variants.GRADIENTS.values(), launches, strict=True):
        assert facts.kernel == "row_gradient_kernel"
        assert facts.stores == stores and facts.loads.get("16", 0) == loads
