"""The first run on a GPU, rehearsed on the CPU: every step, and a second call that resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.first_gpu.__main__ import main
from benchmarks.first_gpu.steps import steps


def rehearse(folder: Path, *arguments: str) -> int:
    return main(["--rehearse", "--output", str(folder), "--budget", "3600", *arguments])


def statuses(folder: Path) -> dict[str, str]:
    record = json.loads((folder / "steps.json").read_text())
    return {name: step["status"] for name, step in record.items() if name != "provenance"}


@pytest.mark.slow
def test_every_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGSPO_REQUIRE_CUDA", "1")  # as where an installation must have it
    code = rehearse(tmp_path)
    logs = {f.name: f.read_text()[-2000:] for f in tmp_path.glob("*.log")}
    assert code == 0, (statuses(tmp_path), logs)
    assert list(statuses(tmp_path)) == [step.name for step in steps(tmp_path, rehearse=True)]
    lines = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    ours = {x["workload"] for x in lines if x["implementation"] == "egspo cpp" and "seconds" in x}
    assert len(ours) == 5
    assert (tmp_path / "profile.txt").exists() and (tmp_path / "iteration.json").exists()


@pytest.mark.slow
def test_a_second_call_does_what_the_first_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without the ceilings the kernels cannot be put in relation to anything: the step fails.
    assert rehearse(tmp_path, "--steps", "kernels") == 1
    assert "failed" in statuses(tmp_path)["kernels"]
    assert rehearse(tmp_path, "--steps", "ceilings", "kernels") == 0
    before = (tmp_path / "kernels.jsonl").read_text().splitlines()
    capsys.readouterr()
    assert rehearse(tmp_path, "--steps", "ceilings", "kernels") == 0
    assert capsys.readouterr().out == "ceilings: done before\nkernels: done before\n"
    # A step that was stopped goes on behind its last line.
    (tmp_path / "kernels.jsonl").write_text("\n".join(before[:3]) + "\n")
    record = json.loads((tmp_path / "steps.json").read_text())
    record["kernels"]["status"] = "stopped after 1 s"
    (tmp_path / "steps.json").write_text(json.dumps(record))
    assert rehearse(tmp_path, "--steps", "kernels") == 0
    after = (tmp_path / "kernels.jsonl").read_text().splitlines()
    assert after[:3] == before[:3] and len(after) == len(before)


def test_no_time_and_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse(tmp_path, "--budget", "0") == 1
    assert "no time left; call again" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert main(["--output", str(tmp_path)]) == 2
        assert "no GPU" in capsys.readouterr().err
