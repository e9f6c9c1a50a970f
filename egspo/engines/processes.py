"""The processes that a launcher started: what they agree on, and who is missing.

Everything that processes tell each other here is small and goes over gloo, whatever the device, so
that one that waits in vain gets an error of this project's and not a watchdog's abort. It says who
is missing, and in which phase.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Self, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")

# Who is done first waits for the others, hours maybe, where nothing bounds the work: no hang.
_UNBOUNDED = timedelta(days=2)
# The list of phases answers at once, or its process is dead.
_ANSWER = timedelta(seconds=10)


class LostProcessError(RuntimeError):
    """Another process failed, or did not come in time."""

    exit_code = 4
    """Of the command line."""


def process_state(timeout: timedelta = _UNBOUNDED) -> PartialState:
    """One process, or those that ``accelerate launch`` or ``torchrun`` started.

    Args:
        timeout: of what they exchange on their devices.

    Raises:
        LostProcessError: another process did not come to the start, or left it.
        ValueError: accelerate sees another number of processes than were started.
    """
    started = world_size()
    # Started by torchrun on CPUs, it would otherwise see one process.
    on_cpus = started > 1 and not torch.cuda.is_available()
    try:
        state = PartialState(cpu=on_cpus, timeout=timeout)
    except torch.distributed.DistError as error:
        raise _absent(started, error) from error
    if state.num_processes != started:
        raise ValueError(
            f"the launcher started {started} processes (WORLD_SIZE), accelerate sees "
            f"{state.num_processes}: they would all do the same"
        )
    return state


def _absent(started: int, error: Exception) -> LostProcessError:
    reason = str(error).partition("\n")[0]  # without torch's C++ stack
    return LostProcessError(
        f"not all of the {started} processes came to the start of the run, or one left it: {reason}"
    )


def world_size() -> int:
    """Processes that the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """This process among ``count``; all of them call :meth:`gather` and what is made of it.

    Args:
        timeout: seconds that one waits for the others in one phase.
        alone: this process is on its own, whatever others there are.

    Raises:
        LostProcessError: (of the methods) a process died, or came later than ``timeout``; names it
            and the phase it was last in.
    """

    def __init__(self, timeout: float = 1800.0, *, alone: bool = False) -> None:
        self.rank, self.count, self.phase = 0, 1, "start"
        self.timeout = timeout
        if alone or not dist.is_initialized():
            return
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        try:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._beats = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._phases = self._shared_store()
        except (RuntimeError, ConnectionError) as error:
            raise _absent(self.count, error) from error
        self.enter("start")

    def share(self, total: int) -> range:
        """The part of ``range(total)`` that is this process's: contiguous, at most one longer than
        another's."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def enter(self, phase: str) -> None:
        """Say what this process does next, for the message of those that will wait for it."""
        self.phase = phase
        if self.count > 1:
            with self._waiting():
                self._phases.set(_key(self.rank), phase)

    def gather(self, value: T) -> list[T]:
        """``value`` of every process, by rank; anything that can be pickled."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        with self._waiting():
            dist.all_gather_object(values, value, group=self._group)
        return cast(list[T], values)

    def largest(self, value: int) -> int:
        """The largest ``value`` of a process."""
        return max(self.gather(value))

    def any(self, value: bool) -> bool:
        """Whether it is so in any process."""
        return any(self.gather(value))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the body before the others do, however long it takes.

        Meanwhile it gives signs of life: one that is frozen is not waited for.
        """
        if self.count == 1:
            yield
        elif self.is_main:
            with _Beating(self._beat, self.timeout / 4) as beating:
                yield
            with self._waiting():
                beating.raise_failure()
                self._beat(done=True)
        else:
            with self._waiting():
                while not self._beat():
                    pass
            yield

    def on_main(self, action: Callable[[], T]) -> None:
        """Run ``action`` in the main process; all of them raise what it raises."""
        error: Exception | None = None
        with self.main_first():
            if self.is_main:
                try:
                    action()
                except Exception as raised:
                    error = raised
        error = self.gather(error)[0]
        if error is not None:
            raise error

    def _beat(self, done: bool = False) -> bool:
        """A sign of life of the main process: whether it is done, as it says."""
        flag = torch.tensor([done])
        dist.broadcast(flag, src=0, group=self._beats)
        return bool(flag)

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Inside, what a backend raises of a process that is gone becomes a LostProcessError."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, LostProcessError) or not _is_of_backend(error):
                raise
            raise LostProcessError(self._who_is_missing()) from error

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ConnectionError) as error:  # torch's distributed errors among them
            raise LostProcessError(self._who_is_missing()) from error

    def _who_is_missing(self) -> str:
        here = (
            f"process {self.rank} waited in '{self.phase}' for the other {self.count - 1}, at most "
            f"{self.timeout:g} s (distributed.timeout)"
        )
        phases = self._known_phases()
        if phases is None:
            return f"{here}: process 0, which knows the phase of each, does not answer"
        elsewhere = [
            f"process {rank} is in '{phase}'"
            for rank, phase in enumerate(phases)
            if phase != self.phase
        ]
        if not elsewhere:
            return f"{here}: one of them ended in the same phase"
        return f"{here}: {', '.join(elsewhere)}, or ended there"

    def _known_phases(self) -> list[str] | None:
        """Of all processes; None if process 0 does not answer, as a frozen one."""
        answer: list[list[str]] = []

        def ask() -> None:
            with suppress(RuntimeError, ConnectionError):
                self._phases.set_timeout(_ANSWER)
                answer.append([self._phases.get(_key(rank)).decode() for rank in range(self.count)])

        # The store waits for its host without end: in a thread that may be left behind.
        asking = Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_ANSWER.total_seconds())
        return answer[0] if answer else None

    def _shared_store(self) -> TCPStore:
        """Kept by process 0, at a free port that it tells the others."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store, port = None, [0]
        if self.is_main:
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port[0] = store.port
        dist.broadcast_object_list(port, src=0, group=self._group)
        wait = timedelta(seconds=self.timeout)
        return store or TCPStore(
            host, port[0], is_master=False, timeout=wait, wait_for_workers=False
        )


class _Beating:
    """Calls ``beat`` every ``seconds`` in a thread, while the body runs."""

    def __init__(self, beat: Callable[[], object], seconds: float) -> None:
        self._beat, self._seconds = beat, seconds
        self._stop = Event()
        self._failure: RuntimeError | None = None
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self._beat()
            except RuntimeError as error:  # nobody is left to tell
                self._failure = error
                return


def _is_of_backend(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors, whose text has the file they are from."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _key(rank: int) -> str:
    return f"phase/{rank}"
