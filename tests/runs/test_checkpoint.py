"""Checkpoints are complete or absent, and damage is found and named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from egspo.files import CheckpointError, remove_partial
from egspo.runs.checkpoint import (
    check_writable,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
)
from egspo.runs.published import publish, verify_published


def write(folder: Path) -> None:
    (folder / "weights").mkdir()
    (folder / "weights" / "a.bin").write_bytes(b"abc")
    (folder / "state.json").write_text("{}")


def run_with(tmp_path: Path, steps: list[int]) -> Path:
    for step in steps:
        save_checkpoint(tmp_path / "checkpoints", step, write, keep_last=2)
    return tmp_path


def test_keeps_the_last(tmp_path: Path) -> None:
    run = run_with(tmp_path, [5, 10, 100])
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step-000010", "step-000100"]
    assert find_checkpoint(run).name == "step-000100"
    assert find_checkpoint(run / "checkpoints" / "step-000010").name == "step-000010"


def test_a_failed_write_leaves_the_old_ones(tmp_path: Path) -> None:
    run = run_with(tmp_path, [1])

    def failing(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(run / "checkpoints", 2, failing, keep_last=1)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000001"]


def test_left_over_partials_are_ignored_and_removed(tmp_path: Path) -> None:
    run = run_with(tmp_path, [1])
    partial = run / "checkpoints" / ".egspo-partial-step-000002-77"
    partial.mkdir()
    assert find_checkpoint(run).name == "step-000001"
    remove_partial(run / "checkpoints")
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["change", "truncate", "remove"])
def test_damage_is_named_and_an_intact_one_offered(tmp_path: Path, damage: str) -> None:
    run = run_with(tmp_path, [1, 2])
    file = run / "checkpoints" / "step-000002" / "weights" / "a.bin"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(b"abd" if damage == "change" else b"a")
    with pytest.raises(CheckpointError, match=r"a\.bin.*step-000001 is intact"):
        find_checkpoint(run)


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="manifest"):
        verify_published(tmp_path)


def test_publish_replaces(tmp_path: Path) -> None:
    publish(tmp_path / "final", write)
    publish(tmp_path / "final", lambda folder: (folder / "only").write_text("x"))
    assert sorted(p.name for p in (tmp_path / "final").iterdir()) == ["manifest.json", "only"]


def test_unwritable_and_full_are_found_at_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(OSError, match=r"output_dir .* cannot be written"):
        check_writable(blocked / "run", 0)
    with pytest.raises(OSError, match="GB free"):
        check_writable(tmp_path / "run", 2**62)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(OSError, match="cannot be written"):
            check_writable(tmp_path / "other", 0)
