"""The folder of a run, before anything is written there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from egspo.engines.processes import Processes
from egspo.files import PARTIAL, remove_partial
from egspo.runs.checkpoint import CHECKPOINTS, check_writable
from egspo.runs.folder import claim
from egspo.runs.lock import RunLock


def occupy(output: Path, processes: Processes) -> RunLock | None:
    """Make ``output`` ready for one run alone; the lock is the main process's, None elsewhere.

    Raises:
        NotOursError: the folder has something else where the run would write.
        OSError: it cannot be written, or is not the same folder in all processes.
        RunLockedError: another run goes there.
    """

    def prepare() -> None:
        claim(output)
        for folder in (output, output / CHECKPOINTS):
            remove_partial(folder)

    lock = lock_folder(output, processes, prepare)
    try:
        check_writable(output, 0)
        _check_shared(output, processes)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return lock


def lock_folder(
    folder: Path, processes: Processes, prepare: Callable[[], object], *, name: str = "output_dir"
) -> RunLock | None:
    """Make ``folder`` and lock it, in the main process: its lock, None elsewhere.

    Args:
        folder: to write to.
        processes: all raise what the main one does.
        prepare: called in the main process, with the lock.
        name: of ``folder``, as the user knows it.

    Raises:
        OSError: it cannot be written.
        RunLockedError: another process has it.
    """
    taken: list[RunLock] = []

    def take() -> None:
        check_writable(folder, 0, name=name)
        taken.append(RunLock(folder, name=name))
        prepare()

    try:
        processes.on_main(take)
    except BaseException:
        for lock in taken:
            lock.release()
        raise
    return taken[0] if taken else None


@contextmanager
def writing_alone(
    folder: Path, processes: Processes, *, leftovers: Sequence[Path], name: str
) -> Iterator[Callable[[], object]]:
    """Inside, ``folder`` is locked; yields a check that it still is, of the main process.

    Args:
        folder, processes, name: as :func:`lock_folder`, which raises.
        leftovers: folders where what killed processes left half-written is deleted.
    """

    def clean() -> None:
        for each in leftovers:
            remove_partial(each)

    lock = lock_folder(folder, processes, clean, name=name)
    try:
        yield (lambda: None) if lock is None else lock.check
    finally:
        if lock is not None:
            lock.release()
            with suppress(OSError):  # only an empty one, in which nothing was written
                folder.rmdir()


def _check_shared(output: Path, processes: Processes) -> None:
    """What one process writes, those on other machines must find; raises OSError."""
    probe = output / f"{PARTIAL}shared"
    if processes.is_main:
        probe.touch()
    processes.gather(None)
    seen = processes.gather(probe.exists())
    if processes.is_main:
        probe.unlink()
    blind = [rank for rank, found in enumerate(seen) if not found]
    if blind:
        raise OSError(
            f"output_dir {output} is not the same folder in all processes: {blind} do not "
            "see what process 0 wrote; put it on a shared file system"
        )
