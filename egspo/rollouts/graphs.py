"""Forward passes replayed as CUDA graphs, one per batch shape."""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from egspo.models.cache import KeyValueCache

Inputs = dict[str, Tensor | None]
Forward = Callable[[Inputs, KeyValueCache | None], Tensor]
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


@dataclass
class _Graph:
    """A recorded pass and the tensors it reads."""

    inputs: Inputs
    cache: KeyValueCache | None
    replay: Callable[[], object]
    output: Tensor
    source: weakref.ref[KeyValueCache] | None = None
    """The cache whose content was copied into ``cache``."""

    def load(self, inputs: Inputs, cache: KeyValueCache | None) -> None:
        for name, tensor in inputs.items():
            own = self.inputs[name]
            if own is not None and tensor is not None:
                own.copy_(tensor)
        if cache is None or self.cache is None:
            return
        if self.source is None or self.source() is not cache:  # once per block, not per step
            self.cache.copy_(cache)
            self.source = weakref.ref(cache)


class GraphReplay:
    """Records a pass the second time that inputs of its shapes come, and replays it from then on.

    Args:
        limit: graphs kept; the one not used for longest is dropped.
        record: ``f(pass) -> (replay, output)``; :func:`record_cuda_graph` unless testing.
    """

    def __init__(self, limit: int = 8, record: Recorder | None = None) -> None:
        self.limit, self.recorded = limit, 0
        self._record = record or record_cuda_graph
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, forward: Forward, inputs: Inputs, cache: KeyValueCache | None) -> Tensor:
        """``forward(inputs, cache)``; the result is valid until the next call.

        Args:
            forward: the pass, of fixed weights in place, the same for inputs of the same names.
            inputs: by name; None is an input that is not there.
            cache: read, and overwritten where the pass does; copied once, not at every call.
        """
        shapes = [None if t is None else (t.shape, t.dtype) for t in inputs.values()]
        key = (*inputs, *shapes, None if cache is None else cache.keys[0].shape)
        graph = self._graphs.get(key)
        if graph is None:
            self._seen[key] += 1
            if self._seen[key] == 1:
                return forward(inputs, cache)
            graph = self._new(forward, inputs, cache)
            self._graphs[key] = graph
            if len(self._graphs) > self.limit:
                dropped, _ = self._graphs.popitem(last=False)
                del self._seen[dropped]
        self._graphs.move_to_end(key)
        graph.load(inputs, cache)
        graph.replay()
        return graph.output

    def _new(self, forward: Forward, inputs: Inputs, cache: KeyValueCache | None) -> _Graph:
        own = {name: None if t is None else t.clone() for name, t in inputs.items()}
        own_cache = None if cache is None else cache.clone()
        replay, output = self._record(lambda: forward(own, own_cache))
        self.recorded += 1
        return _Graph(own, own_cache, replay, output)


def check_device(device: torch.device) -> None:
    """Raise ValueError where ``generation.cuda_graphs`` is asked for without a GPU."""
    if device.type != "cuda":
        raise ValueError(f"generation.cuda_graphs needs a GPU, the model is on {device.type!r}")


def record_cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """A CUDA graph of ``run``, after a first call that lets libraries set themselves up."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output
