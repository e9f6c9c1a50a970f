"""Processes of one group that call what a test tells them to, all at once."""

from __future__ import annotations

import atexit
import datetime
import functools
import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Of matrices this small further threads only wait for each other, long on a busy machine.
torch.set_num_threads(1)


class Ranks:
    """``world_size`` processes with a group, forked from one that has the imports done."""

    def __init__(self, world_size: int, timeout: float = 30.0, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
        if backend == "gloo":
            context.set_forkserver_preload(["tests.kernels.vocab_cases"])
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        pipes = [context.Pipe() for _ in range(world_size)]
        self._pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(theirs, store, rank, world_size, timeout, backend))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(rank, *arguments)`` on every rank; an exception where that is what it left.

        A rank that died left an ``EOFError``.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        return [_received(pipe) for pipe in self._pipes]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


@functools.cache
def shared_ranks(world_size: int, backend: str = "gloo") -> Ranks:
    """Processes that all tests use that leave them well."""
    ranks = Ranks(world_size, backend=backend)
    atexit.register(ranks.close)
    return ranks


def _received(pipe: Connection) -> Any:
    if not pipe.poll(60):
        return TimeoutError("the rank hangs")
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionResetError) as error:
        return EOFError(repr(error))


def _serve(
    pipe: Connection, store: Path, rank: int, world_size: int, timeout: float, backend: str
) -> None:
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        result: Any
        try:
            result = function(rank, *arguments)
        except Exception as error:
            result = error
        pipe.send_bytes(pickle.dumps(result))
