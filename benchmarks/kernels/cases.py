"""One implementation on one workload: how it is measured and what is recorded."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.kernels import eager
from benchmarks.kernels.implementation import Implementation
from benchmarks.kernels.implementations import implementations
from benchmarks.kernels.workloads import (
    Outputs,
    Work,
    Workload,
    floor_seconds,
    make_inputs,
    work_of,
    workloads,
)
from benchmarks.timing import Clock, Sampler, peak_bytes, ring_of, rounds_for

BUDGET_SECONDS = {"cuda": 1.0, "cpu": 0.5}
"""Of samples for each case."""
SELECTIONS = 16
"""Inputs of a selection."""


class Ready(NamedTuple):
    """What is left to time."""

    calls: Sequence[Callable[[], object]]
    """The same on each set of inputs."""
    outputs: list[str]
    errors: dict[str, float] | None
    """None where float64 does not fit in memory."""
    first_call_seconds: float
    """With compilation."""


@dataclass(frozen=True)
class Case:
    implementation: Implementation
    workload: Workload

    @property
    def id(self) -> str:
        return f"{self.workload.id} by {self.implementation.name}"

    def ready(self, device: torch.device) -> Ready:
        """Inputs made, code compiled, outputs compared with float64."""
        workload = self.workload
        inputs = make_inputs(workload, device)
        function = self.implementation.build(workload)
        prepared = self.implementation.prepare(inputs)
        started = time.perf_counter()
        outputs = self.implementation.restore(eager.run(function, workload, prepared))
        first = time.perf_counter() - started
        ring = self._selections(prepared, device) if workload.selects else ring_of(prepared, device)
        calls = [functools.partial(eager.run, function, workload, each) for each in ring]
        return Ready(calls, sorted(outputs), self._errors(inputs, outputs), first)

    def _selections(self, prepared: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
        """Few enough to be in the cache, where entropies have just been written, and different: of
        those that come again at once a processor knows the branches by heart."""
        others = (make_inputs(self.workload, device, seed) for seed in range(1, SELECTIONS))
        return [prepared, *map(self.implementation.prepare, others)]

    def _errors(self, inputs: dict[str, Any], outputs: Outputs) -> dict[str, float] | None:
        try:
            exact = eager.truth(self.workload, inputs, outputs)
        except torch.cuda.OutOfMemoryError:
            return None
        return eager.errors(self.workload, outputs, exact)

    def measure(self, benchmark: Any, clock: Clock, device: torch.device, ceilings: Any) -> None:
        """Samples through pytest-benchmark, and what they amount to in its ``extra_info``."""
        ready = self.ready(device)
        sampler = Sampler(ready.calls, device)

        def sample() -> None:
            clock.seconds += sampler.sample()

        started = time.perf_counter()
        sampler.sample()
        rounds = rounds_for(time.perf_counter() - started, BUDGET_SECONDS[device.type])
        benchmark.pedantic(sample, rounds=rounds)
        workload, work = self.workload, work_of(self.workload)
        benchmark.extra_info.update(
            suite="kernels",
            implementation=self.implementation.name,
            function=workload.function,
            **{"pass": workload.pass_name},
            kl=workload.kl,
            shape=workload.shape,
            rows=workload.rows,
            dtype=workload.dtype_name,
            device=device.type,
            outputs=ready.outputs,
            errors=ready.errors,
            first_call_seconds=ready.first_call_seconds,
            timing=sampler.method,
            timing_note=sampler.note,
            input_sets=len(ready.calls),
            peak_bytes=peak_bytes(ready.calls[0], device),
        )
        if benchmark.enabled:
            seconds = statistics.median(benchmark.stats.stats.data)
            benchmark.extra_info.update(achieved(work, workload, seconds, ceilings))


def cases(device: str) -> list[Case]:
    """The whole suite for ``"cuda"`` or ``"cpu"``, with what cannot run."""
    known = implementations(device)
    return [
        Case(implementation, workload)
        for workload in workloads(device)
        for implementation in known
        if workload.function in implementation.functions
    ]


def achieved(
    work: Work, workload: Workload, seconds: float, ceilings: dict[str, Any]
) -> dict[str, float]:
    """Rates, and their share of what this device reached in the same run."""
    moved, flops = work.operand_bytes + work.logit_bytes, work.gemm_flops + work.vector_flops
    floor = floor_seconds(work, ceilings, workload.dtype_name)
    rate = ceilings["flops_per_second"][workload.dtype_name]
    return {
        "bytes_moved": moved,
        "flops": flops,
        "bytes_per_second": moved / seconds,
        "flops_per_second": flops / seconds,
        "share_of_bandwidth": moved / seconds / ceilings["bytes_per_second"],
        "share_of_gemm_rate": work.gemm_flops / seconds / rate,
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
    }
