"""Every kernel against plain PyTorch, torch.compile of it, and its peers.

pytest benchmarks/kernels --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.kernels.cases import Case, cases
from benchmarks.timing import Clock

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize("case", cases(DEVICE.type), ids=lambda case: case.id)
def test_kernel(case: Case, benchmark: BenchmarkFixture, ceilings: dict[str, Any]) -> None:
    reason = case.implementation.lacks(case.workload, DEVICE)
    if reason is not None:
        benchmark.skipped = True
        pytest.skip(reason)
    benchmark.group = case.workload.id
    try:
        case.measure(benchmark, CLOCK, DEVICE, ceilings)
    except torch.cuda.OutOfMemoryError:
        benchmark.skipped = True
        pytest.skip(f"out of memory on {torch.cuda.get_device_name()}")
