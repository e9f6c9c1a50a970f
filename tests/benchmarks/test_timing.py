from __future__ import annotations

import time

import pytest
import torch

from benchmarks.timing import Clock, Sampler, cache_bytes, peak_bytes, ring_of, rounds_for

CPU = torch.device("cpu")


def test_a_sample_is_the_time_of_one_call() -> None:
    sampler = Sampler([lambda: time.sleep(0.004)], CPU)
    assert sampler.method == "perf_counter" and sampler.note is None
    assert 0.004 <= min(sampler.sample() for _ in range(5)) < 0.02


def test_short_calls_are_repeated_and_divided() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    sampler = Sampler([call], CPU)
    before = calls
    seconds = sampler.sample()
    assert calls - before >= 100
    assert 0 < seconds < 1e-4


def test_calls_take_turns() -> None:
    seen: list[int] = []
    calls = [lambda place=place: (seen.append(place), time.sleep(0.002)) for place in range(3)]
    sampler = Sampler(calls, CPU)
    for _ in range(4):
        sampler.sample()
    assert seen == [place % 3 for place in range(len(seen))]
    with pytest.raises(ValueError, match="calls must hold"):
        Sampler([], CPU)


def test_rounds_fit_the_budget_within_bounds() -> None:
    assert rounds_for(0.1, budget=1.0) == 10
    assert rounds_for(10.0, budget=1.0) == 5
    assert rounds_for(0.0, budget=1.0) == 50


def test_input_sets_exceed_the_cache() -> None:
    inputs = {"x": torch.randn(2**19).requires_grad_(), "k": 3}
    ring = ring_of(inputs, CPU)
    assert ring[0] is inputs
    assert len(ring) == min(64, -(-2 * cache_bytes(CPU) // inputs["x"].nbytes))
    assert len({each["x"].data_ptr() for each in ring}) == len(ring)
    assert all(each["x"].is_leaf and each["x"].requires_grad for each in ring)
    assert all(torch.equal(each["x"], inputs["x"]) and each["k"] == 3 for each in ring)


def test_peak_memory_is_the_most_alive_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            torch.ones(2**20)  # 4 MiB, freed at once
        both = torch.ones(2**18), torch.ones(2**18)
        del both

    assert peak_bytes(call, CPU) == pytest.approx(2**22, rel=0.01)
    assert peak_bytes(lambda: None, CPU) == 0


def test_pytest_benchmark_reads_the_samples() -> None:
    clock = Clock()
    before = clock.read()
    clock.seconds += 0.25
    assert clock.read() - before == 0.25


@pytest.mark.gpu
def test_short_kernels_are_replayed_from_a_graph() -> None:
    device = torch.device("cuda")
    x = torch.randn(1024, device=device)
    sampler = Sampler([lambda: x.add_(1), lambda: x.sub_(1)], device)
    assert sampler.method == "graph"
    assert 0 < sampler.sample() < 1e-4


@pytest.mark.gpu
def test_what_synchronises_is_timed_with_launches_and_says_so() -> None:
    x = torch.randn(1024, device="cuda")
    sampler = Sampler([lambda: x.sum().item()], torch.device("cuda"))
    assert sampler.method == "events" and "no CUDA graph" in str(sampler.note)
