"""The first run on a GPU, rehearsed on the CPU: every step, and a second call that resumes."""

from __future__ import annotations

import contextlib
import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.first_gpu import measure
from benchmarks.first_gpu.__main__ import main
from benchmarks.first_gpu.steps import steps

START = subprocess.run


def rehearse(folder: Path, *arguments: str) -> int:
    return main(["--rehearse", "--output", str(folder), "--budget", "3600", *arguments])


def statuses(folder: Path) -> dict[str, str]:
    record = json.loads((folder / "steps.json").read_text())
    return {name: step["status"] for name, step in record.items() if name != "provenance"}


def run_here(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """In the place of ``subprocess.run``: modules of the benchmarks in this process, as a new one
    would spend most of its time on imports."""
    if not command[2].startswith("benchmarks."):
        return START(command, **options)
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", command[2:]),
        contextlib.redirect_stdout(options["stdout"]),
        warnings.catch_warnings(action="ignore"),  # of a module that was imported before
    ):
        try:
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(command, code or 0)


@pytest.mark.slow
def test_every_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGSPO_REQUIRE_CUDA", "1")  # as where an installation must have it
    monkeypatch.setattr("benchmarks.first_gpu.__main__.subprocess.run", run_here)
    code = rehearse(tmp_path)
    logs = {f.name: f.read_text()[-2000:] for f in tmp_path.glob("*.log")}
    assert code == 0, (statuses(tmp_path), logs)
    assert list(statuses(tmp_path)) == [step.name for step in steps(tmp_path, rehearse=True)]
    lines = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    ours = {x["workload"] for x in lines if x["implementation"] == "egspo cpp" and "seconds" in x}
    assert len(ours) == 5
    assert (tmp_path / "profile.txt").exists()
    for path in tmp_path.glob("iteration*.json"):
        memory = json.loads(path.read_text())["memory"]
        assert memory["estimated"] > 0 and memory["measured"] > 0
    assert len(list(tmp_path.glob("iteration*.json"))) == 4


@pytest.mark.slow
def test_a_second_call_does_what_the_first_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without the ceilings the kernels cannot be put in relation to anything: the step fails.
    assert rehearse(tmp_path, "--steps", "kernels") == 1
    assert "failed" in statuses(tmp_path)["kernels"]
    device = torch.device("cpu")
    measure.ceilings(device, tmp_path, rehearse=True)
    measure.kernels(device, tmp_path, rehearse=True)
    before = (tmp_path / "kernels.jsonl").read_text().splitlines()
    # A step that was stopped goes on behind its last line.
    (tmp_path / "kernels.jsonl").write_text("\n".join(before[:-2]) + "\n")
    measure.kernels(device, tmp_path, rehearse=True)
    after = (tmp_path / "kernels.jsonl").read_text().splitlines()
    assert after[:-2] == before[:-2] and len(after) == len(before)
    record = json.loads((tmp_path / "steps.json").read_text())
    record["kernels"]["status"] = "done"
    (tmp_path / "steps.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert rehearse(tmp_path, "--steps", "kernels") == 0
    assert capsys.readouterr().out == "kernels: done before\n"


def test_no_time_and_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse(tmp_path, "--budget", "0") == 1
    assert "no time left; call again" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert main(["--output", str(tmp_path)]) == 2
        assert "no GPU" in capsys.readouterr().err
