"""How a call is timed: CUDA events or graph replay on a GPU, ``perf_counter`` on a CPU.

Calls go round a ring of input sets that together are larger than the last-level cache, so that no
call finds its inputs there. A sample is the mean over enough calls to be read off the clock; what
is reported is the median of the samples.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

GRAPH_BELOW = 500e-6
"""Seconds: calls below it are replayed from a CUDA graph, or the launches would be timed."""
SAMPLE_SECONDS = {"cuda": 2e-3, "cpu": 1e-3}
MOST_SETS = 64


class Clock:
    """What pytest-benchmark reads for the time: it advances by one call with each sample.

    Its statistics are those of the samples, whichever clock of the device measured them.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def read(self) -> float:
        return self.seconds


class Sampler:
    """Times calls that do the same on different inputs.

    Args:
        calls: the same work, each on its own input set.
        device: where they run.

    Attributes:
        method: ``"perf_counter"``, ``"events"`` or ``"graph"``.
        note: why a graph could not be captured, or None.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        if not calls:
            raise ValueError("calls must hold at least one call, got none")
        self.note: str | None = None
        self._ring: Iterator[Call] = itertools.cycle(calls)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._count = 1
        self.method = "perf_counter" if device.type == "cpu" else "events"
        for _ in range(2):  # warm up: compilation, caches of kernels and memory
            self._run()
        estimate = self.sample()
        self._count = max(1, min(10_000, int(SAMPLE_SECONDS[device.type] / max(estimate, 1e-7))))
        if self.method == "events" and estimate < GRAPH_BELOW:
            self._count = max(self._count, len(calls))
            self._capture()

    def sample(self) -> float:
        """Seconds of one call."""
        if self.method == "perf_counter":
            start = time.perf_counter()
            self._run()
            return (time.perf_counter() - start) / self._count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / self._count

    def _run(self) -> None:
        for _ in range(self._count):
            next(self._ring)()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made lazily on a new stream
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run()
        except RuntimeError as error:  # a synchronisation inside, most often
            torch.cuda.synchronize()
            self.note = f"no CUDA graph, timed with launches: {str(error).splitlines()[0]}"
            return
        self._graph, self.method = graph, "graph"


def rounds_for(seconds: float, budget: float, least: int = 5, most: int = 50) -> int:
    """Samples of ``seconds`` that fit in ``budget`` seconds, within bounds."""
    return max(least, min(most, int(budget / max(seconds, 1e-9))))


def ring_of(inputs: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Copies of ``inputs`` that together are twice the last-level cache; the first is the original.

    At most 64 copies are made.
    """
    size = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    count = -(-2 * cache_bytes(device) // max(size, 1))
    copies = [inputs]
    for _ in range(min(count, MOST_SETS) - 1):
        copies.append({name: _copy(value) for name, value in inputs.items()})
    return copies


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: L2 of a GPU, L3 of a CPU (32 MiB where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return 32 * 2**20
    unit = {"K": 2**10, "M": 2**20}.get(text[-1], 1)
    return int(text.rstrip("KM")) * unit


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes of tensors alive at once during ``call``, beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    return max(itertools.accumulate((size for _, size in sorted(changes)), initial=0))


def measure_ceilings(device: torch.device, *, tiny: bool = False) -> dict[str, Any]:
    """What this device reaches: copy bandwidth and matrix product rate.

    Args:
        tiny: of sizes that take no time and say nothing, for rehearsals.

    Returns:
        ``bytes_per_second``, read and written bytes of a copy far larger than any cache;
        ``flops_per_second`` by dtype of the operands of a square product.
    """
    gpu = device.type == "cuda"
    bandwidth = _copy_bandwidth(2**16 if tiny else 2**30 if gpu else 2**28, device)
    size = 64 if tiny else 8192 if gpu else 1024
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(left)
        call = _product(left, right, product)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / _median_seconds(call, device)
    return {"bytes_per_second": bandwidth, "flops_per_second": rates}


def _copy_bandwidth(size: int, device: torch.device) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Call:
    return lambda: torch.mm(left, right, out=out)


def _median_seconds(call: Call, device: torch.device) -> float:
    sampler = Sampler([call], device)
    return statistics.median(sampler.sample() for _ in range(11))
