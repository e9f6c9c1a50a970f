"""One run at a time in a folder, whoever died there before."""

from __future__ import annotations

import json
import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from egspo.files import PARTIAL
from egspo.runs.lock import LOCK, RunLock, RunLockedError, alone
from tests.helpers import runs

ELSEWHERE = {"token": "x", "host": "far", "process": 7, "since": "then", "machine": "other"}


def hold(folder: Path, ready: Any) -> None:
    lock = RunLock(folder)
    ready.set()
    time.sleep(60)
    lock.check()


def held(folder: Path) -> Any:
    """A process that holds the lock of ``folder``."""
    context = get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(folder, ready))
    process.start()
    assert ready.wait(60)
    return process


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    process = held(tmp_path)
    with pytest.raises(RunLockedError) as error:
        RunLock(tmp_path)
    for part in (f"process {process.pid} on {os.uname().nodename} since 20", f"{tmp_path}"):
        assert part in str(error.value)
    # Stopped it still is: it may go on any time.
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(RunLockedError):
        RunLock(tmp_path)
    process.kill()
    process.join()
    with RunLock(tmp_path):  # at once
        pass
    assert not list(tmp_path.iterdir())


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    holder = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**holder, "token": "x", "started": "12"}))
    with RunLock(tmp_path), pytest.raises(RunLockedError, match="taken over by process"):
        lock.check()


def test_within_a_process_the_earlier_run_notices(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    with RunLock(tmp_path) as second:
        second.check()
        with pytest.raises(RunLockedError, match="taken over by process"):
            first.check()
        first.release()
        second.check()


@pytest.mark.parametrize("content", [json.dumps(ELSEWHERE), "", "{", "[1]", '{"machine": null}'])
def test_on_another_machine_signs_of_life_count(tmp_path: Path, content: str) -> None:
    """Whatever a damaged lock says."""
    (tmp_path / LOCK).write_text(content)
    start = time.monotonic()
    with RunLock(tmp_path, stale=0.3) as lock:
        assert time.monotonic() - start >= 0.3
        lock.check()


def test_a_living_holder_elsewhere_is_known_at_its_next_beat(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, beat=0.05)
    holder = json.loads((tmp_path / LOCK).read_text())
    file = tmp_path / LOCK
    with file.open("r+") as stream:  # the same file, as from elsewhere
        stream.write(json.dumps({**holder, "machine": "other", "host": "far"}))
        stream.truncate()
    start = time.monotonic()
    with pytest.raises(RunLockedError, match=r"in use by process \d+ on far since"):
        RunLock(tmp_path, stale=30.0)
    assert time.monotonic() - start < 20
    lock.release()
    assert not file.exists()


def test_a_folder_that_is_gone_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLock(folder) as lock:
        (folder / LOCK).unlink()
        folder.rmdir()
        with pytest.raises(RunLockedError, match="was deleted or emptied while the run went"):
            lock.check()


def test_what_is_written_alone(tmp_path: Path) -> None:
    """Half-written files of others, and of names that only begin the same, stay."""
    target, link = tmp_path / "new" / "out[1].json", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    names = (f"{PARTIAL}out[1].json-1", f"{PARTIAL}out1.json-1", f"{PARTIAL}out[1].jsonl-1")
    for name in names:
        (target.parent / name).write_text("half")
    with alone(target):
        assert (target.parent / f"{LOCK}-out[1].json").is_file()
        assert not (target.parent / names[0]).exists()
    assert {path.name for path in target.parent.iterdir()} == set(names[1:])
    runs.hold_elsewhere(target.parent / f"{LOCK}-out[1].json")
    for path in (target, link):
        with (
            pytest.raises(RunLockedError, match=r"--html .* is in use by"),
            alone(path, name="--html"),
        ):
            pass
    with alone(Path("/dev/null")):
        assert not list(Path("/dev").glob(f"{LOCK}*"))


def test_many_at_once_and_one_wins(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"token": "dead", **_gone()}))
    context = get_context("fork")
    with context.Pool(8) as pool:
        won = pool.map(_try, [tmp_path] * 8, chunksize=1)
    assert sum(won) == 1


def _gone() -> dict[str, Any]:
    from egspo.runs.lock import _identity

    return {**_identity(os.getpid()), "process": 2**22 + 1, "host": "here"}


def _try(folder: Path) -> bool:
    try:
        lock = RunLock(folder)
    except RunLockedError:
        time.sleep(0.5)
        return False
    time.sleep(2.0)
    lock.check()
    lock.release()
    return True
