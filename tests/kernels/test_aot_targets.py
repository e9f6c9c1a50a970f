"""Every variant compiles for GPUs of which no other test looks at the code: nothing runs here."""

from __future__ import annotations

import pytest

from tests.kernels import variants
from tests.kernels.aot import Target, distinct

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

TARGETS = (
    Target("cuda", 100),
    Target("cuda", 120),
    Target("hip", "gfx942", 64),
    Target("hip", "gfx1100"),
)
KERNELS = {
    "row_gradient_kernel",
    "row_kl_kernel",
    "row_normaliser_kernel",
    "row_sample_kernel",
    "row_statistics_kernel",
    "segment_kl_kernel",
    "segment_sample_kernel",
    "segment_statistics_kernel",
    "step_kernel",
    "total_kernel",
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda each: f"{each.backend}-{each.architecture}")
def test_every_variant_compiles(target: Target) -> None:
    found = distinct(variants.kernels(target, variants.EVERY))
    assert {facts.kernel for facts in found} == KERNELS
    assert len(found) >= 50
