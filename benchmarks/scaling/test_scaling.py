"""How cost grows with each size of an iteration.

    pytest benchmarks/scaling --benchmark-only

``python -m benchmarks.scaling`` prints the slopes. Sizes are small on every device.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.iteration.measure import IMPLEMENTATIONS, Implementation
from benchmarks.scaling.sweeps import AXES, BASE, MULTIPLES, measure, slopes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axis", AXES)
def test_scaling(axis: str, implementation: Implementation, benchmark: BenchmarkFixture) -> None:
    """What pytest-benchmark times is the whole sweep; the points are in ``extra_info``."""
    benchmark.group = f"scaling, {axis}"
    arguments = (BASE, axis, MULTIPLES, implementation, "egspo-sa", DEVICE, 1)
    points = benchmark.pedantic(measure, args=arguments, rounds=1)
    benchmark.extra_info.update(
        suite="scaling",
        implementation=implementation,
        axis=axis,
        base=asdict(BASE),
        device=DEVICE,
        points=[asdict(point) for point in points],
        slopes=slopes(points),
    )
