"""One full iteration, phase by phase: egspo against plain research code.

    pytest benchmarks/iteration --benchmark-only
    EGSPO_BENCHMARK_SIZE=llada-8b pytest benchmarks/iteration --benchmark-only

LLaDA-8B's sizes on a GPU, small ones on a CPU, unless ``EGSPO_BENCHMARK_SIZE`` says otherwise.
"""

from __future__ import annotations

import os
from dataclasses import asdict

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.iteration.measure import (
    ALGORITHMS,
    IMPLEMENTATIONS,
    Algorithm,
    Bench,
    Implementation,
    seconds,
)
from benchmarks.iteration.problem import SIZES
from benchmarks.meter import PhaseCost, merged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = os.environ.get("EGSPO_BENCHMARK_SIZE") or {"cuda": "llada-8b", "cpu": "small"}[DEVICE]
ROUNDS = 3


@pytest.fixture(scope="module")
def bench() -> Bench:
    if SIZE not in SIZES:
        raise pytest.UsageError(f"EGSPO_BENCHMARK_SIZE must be one of {sorted(SIZES)}, got {SIZE}")
    return Bench(SIZES[SIZE], DEVICE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_iteration(
    bench: Bench, algorithm: Algorithm, implementation: Implementation, benchmark: BenchmarkFixture
) -> None:
    benchmark.group = f"iteration, {algorithm}, {SIZE}"
    agreement = bench.agreement(algorithm)
    counted = bench.run(implementation, algorithm, "count")
    rounds: list[dict[str, PhaseCost]] = []
    benchmark.pedantic(
        lambda: rounds.append(bench.run(implementation, algorithm, "time")), rounds=ROUNDS
    )
    phases = merged(min(rounds, key=seconds), counted)
    benchmark.extra_info.update(
        suite="iteration",
        algorithm=algorithm,
        implementation=implementation,
        size=SIZE,
        problem=asdict(bench.problem),
        device=DEVICE,
        phases={name: asdict(cost) for name, cost in phases.items()},
        same_tokens=agreement.tokens,
        same_selected=agreement.selected,
    )
