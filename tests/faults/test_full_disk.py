"""A disk that is full from some moment on: one sentence, nothing of before is lost, and it goes on.

What the kernel refuses is a file beyond the process's limit; to a program it is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from egspo.cli import main
from egspo.config.recipe import save_config
from egspo.runs.checkpoint import list_checkpoints
from egspo.runs.published import verify_published
from tests.faults.harness import SFT, SHORT
from tests.helpers import runs

pytestmark = pytest.mark.slow  # a process each

TRAIN, WARM, PLAIN = "train", "warm start", "sft"
MOMENTS = [
    (TRAIN, "egspo.runs.metrics._append", 2),
    (TRAIN, "torch.save", 2),
    (TRAIN, "egspo.runs.published._inventory", 2),
    (TRAIN, "egspo.training.trainer.write_group", 2),
    (TRAIN, "egspo.training.trainer.publish", 1),
    (WARM, "egspo.training.warm_start.publish", 1),
    (WARM, "egspo.runs.metrics._append", 3),
    (PLAIN, "egspo.runs.metrics._append", 3),
    (PLAIN, "torch.save", 2),
]


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
        yield


def command(kind: str, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    changes = [SHORT, {"steps": 1}, {"sft": SFT["sft"]}] if kind == WARM else [SHORT, SFT]
    save_config(runs.config(folder / "run", *changes), folder / "recipe.yaml")
    name = "sft" if kind == PLAIN else "train"
    return [name, str(folder / "recipe.yaml"), "--resume", "auto"]


def full(arguments: list[str], target: str, call: int, folder: Path) -> str:
    """What the command says, which ends with exit code 2."""
    log = folder / "log"
    process = runs.forkserver().Process(
        target=runs.command_on_a_full_disk, args=(arguments, target, call, log)
    )
    process.start()
    process.join(120)
    process.kill()
    said = log.read_text()
    assert process.exitcode == 2, (process.exitcode, said)
    assert "Traceback" not in said
    return " ".join(said.partition("egspo: error: ")[2].split())


@pytest.mark.parametrize(("kind", "target", "call"), MOMENTS)
def test_training(
    kind: str, target: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EGSPO_CACHE", str(tmp_path / "cache"))
    arguments = command(kind, tmp_path / "a")
    said = full(arguments, target, call, tmp_path)
    # What writes tensors knows no reason.
    reason = "could not be saved" if target == "torch.save" else "File too large"
    assert reason in said and str(tmp_path) in said
    for checkpoint in list_checkpoints(tmp_path / "a" / "run" / "checkpoints"):
        verify_published(checkpoint)
    assert main(arguments) == 0
    other = command(kind, tmp_path / "b")
    assert main(other) == 0
    if kind != PLAIN:
        assert runs.outcome(tmp_path / "a" / "run") == runs.outcome(tmp_path / "b" / "run")
    one, two = (sorted((tmp_path / name / "run" / "final").rglob("*.safetensors")) for name in "ab")
    assert one and [f.read_bytes() for f in one] == [f.read_bytes() for f in two]
    assert not list((tmp_path / "a").rglob(".egspo-partial*"))


def test_what_is_measured_and_exported(tmp_path: Path) -> None:
    assert main(command(TRAIN, tmp_path / "model")) == 0
    run = tmp_path / "model" / "run"
    measure = ["eval", str(run), "--batch-size", "1", "--output-dir", str(tmp_path / "eval")]
    for target, call in (("append", 2), ("join", 2)):
        said = full(measure, f"egspo.evaluations.records.SampleFile.{target}", call, tmp_path)
        assert "File too large" in said and str(tmp_path / "eval") in said
    assert main(measure) == 0
    assert main([*measure[:-1], str(tmp_path / "whole")]) == 0
    samples, whole = (tmp_path / n / "samples" / "sudoku-20.jsonl" for n in ("eval", "whole"))
    assert samples.read_bytes() == whole.read_bytes()
    export = ["export", str(run), "--output", str(tmp_path / "exported")]
    said = full(export, "egspo.training.export.publish", 1, tmp_path)
    assert said.startswith(f"{tmp_path / 'exported'} could not be saved: ")
    assert said.endswith("File too large") and len(said) < 300
    assert not [path for path in tmp_path.iterdir() if "export" in path.name]
    assert main(export) == 0
