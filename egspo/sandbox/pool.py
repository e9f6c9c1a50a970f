"""Many programs at once, each verdict reached once."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from types import TracebackType

from egspo.sandbox.verdict import Backend, Verdict


class SandboxPool:
    """Workers that run programs in a backend; verdicts are cached by content.

    Safe to use from several threads. A program that is asked for again while it runs is not run
    twice. A verdict that a time limit had a part in is not kept: it may have been the machine.

    Args:
        backend: where programs run.
        workers: how many at a time; None: half the cores, as each run is two processes.
        cache_size: how many verdicts are kept, the least recently used one is dropped; 0 for none.

    Raises:
        ValueError: for ``workers`` < 1 or ``cache_size`` < 0.
    """

    def __init__(
        self, backend: Backend, *, workers: int | None = None, cache_size: int = 65536
    ) -> None:
        if workers is None:
            workers = max(1, (os.cpu_count() or 1) // 2)
        if workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}")
        if cache_size < 0:
            raise ValueError(f"cache_size must be >= 0, got {cache_size}")
        self.backend = backend
        self.workers = workers
        self._cache_size = cache_size
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self._running: dict[bytes, Future[Verdict]] = {}
        self._queue: queue.SimpleQueue[tuple[Future[Verdict], str, str] | None]
        self._queue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def run(self, code: str, tests: str) -> Verdict:
        """Test one program.

        Raises:
            SandboxError: no verdict could be reached.
        """
        return self.submit(code, tests).result()

    def run_many(self, programs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Test pairs of program and tests, several at a time; equal ones once.

        Raises:
            SandboxError: no verdict could be reached for one of them.
        """
        futures = [self.submit(code, tests) for code, tests in programs]
        try:
            return [self._wait(*each) for each in zip(futures, programs, strict=True)]
        finally:  # after an error or an interrupt the rest is of no use
            for future in futures:
                future.cancel()

    def _wait(self, future: Future[Verdict], program: tuple[str, str]) -> Verdict:
        try:
            return future.result()
        except CancelledError:  # by another thread that had asked for the same
            return self.run(*program)

    def submit(self, code: str, tests: str) -> Future[Verdict]:
        """The verdict to come."""
        key = self._key(code, tests)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                done: Future[Verdict] = Future()
                done.set_result(self._cache[key])
                return done
            running = self._running.get(key)
            if running is not None and not running.cancelled():
                return running
            future: Future[Verdict] = Future()
            self._start_threads()
            self._running[key] = future
        future.add_done_callback(lambda ended: self._keep(key, ended))
        self._queue.put((future, code, tests))
        return future

    def _start_threads(self) -> None:
        if self._closed:
            raise RuntimeError("the sandbox pool is closed")
        # Daemons: a training run that is interrupted must not wait for what is queued. What runs
        # ends with this process.
        while len(self._threads) < self.workers:
            name = f"sandbox-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            future, code, tests = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self.backend.run(code, tests))
            except BaseException as error:
                future.set_exception(error)

    def _keep(self, key: bytes, ended: Future[Verdict]) -> None:
        with self._lock:
            if self._running.get(key) is ended:
                del self._running[key]
            if ended.cancelled() or ended.exception() is not None or ended.result().timed_out:
                return
            self._cache[key] = ended.result()
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def _key(self, code: str, tests: str) -> bytes:
        parts = [part.encode("utf-8", "surrogatepass") for part in (code, tests)]
        identity = self.backend.identity.encode()
        sizes = ",".join(str(len(part)) for part in (identity, *parts)).encode()
        return hashlib.sha256(b"\n".join([sizes, identity, *parts])).digest()

    def close(self) -> None:
        """Wait for what runs, drop what waits; no program can be run any more."""
        with self._lock:
            self._closed = True
            waiting = list(self._running.values())
        for future in waiting:
            future.cancel()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
