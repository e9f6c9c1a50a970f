"""Nothing that egspo did not write is deleted, and damage beside the weights blocks no run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from egspo.cli import main
from egspo.config.recipe import save_config
from egspo.files import CheckpointError, set_aside
from egspo.runs.checkpoint import list_checkpoints
from egspo.runs.folder import MARK
from egspo.runs.lock import LOCK, RunLock, RunLockedError
from egspo.runs.metrics import read_metrics
from egspo.runs.published import MANIFEST, NotOursError, _inventory, publish, verify_published
from egspo.training.trainer import train
from tests.helpers import runs
from tests.helpers.runs import SIGKILL, outcome, strike

KL = {"algorithm": {"beta": 0.1}}  # keeps a base
LORA: dict[str, Any] = {"model": {"lora": {"rank": 2, "alpha": 4}}}
FOUR = {"checkpoint": {"every": 1, "keep_last": 2}, "eval": {"every": 1}}


@pytest.fixture(autouse=True, scope="module")
def no_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(runs.config(run, FOUR))
    return run


@pytest.fixture
def half(tmp_path: Path, finished: Path) -> Path:
    """A run of four steps that has made three."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    return run


@pytest.mark.parametrize("name", ["base", "final", "checkpoints", "config.yaml", "samples"])
def test_what_a_user_has_there_is_named_and_left_alone(name: str, tmp_path: Path) -> None:
    mine = tmp_path / name
    if "." not in name:
        mine.mkdir()
        mine /= "thesis.txt"
    mine.write_text("years of work")
    with pytest.raises(NotOursError, match=f"is no run of egspo and has {name}"):
        train(runs.config(tmp_path, KL))
    assert mine.read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_file_added_to_what_was_published_is_not_deleted(finished: Path, half: Path) -> None:
    shutil.copytree(finished / "final", half / "final")
    (half / "final" / "notes.txt").write_text("mine")
    with pytest.raises(NotOursError, match=r"final has what egspo did not write \(notes\.txt\)"):
        train(runs.config(half, FOUR), resume=half)
    assert (half / "final" / "notes.txt").read_text() == "mine"
    (half / "final" / "notes.txt").unlink()
    old = half / "checkpoints" / "step-000003" / "notes.txt"
    old.write_text("mine")
    train(
        runs.config(half, FOUR, {"checkpoint": {"keep_last": 1, "keep_best": False}}), resume=half
    )
    kept = [path for path in (half / "checkpoints").glob("step-000003.old-*/notes.txt")]
    assert [path.read_text() for path in kept] == ["mine"]
    assert len(list_checkpoints(half / "checkpoints")) <= 2


@pytest.mark.parametrize("name", [MARK, LOCK])
def test_pipes_are_not_waited_for(name: str, half: Path) -> None:
    (half / name).unlink(missing_ok=True)
    os.mkfifo(half / name)
    if name == LOCK:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("egspo.training.occupation.RunLock", partial(RunLock, stale=0.2))
            train(runs.config(half, FOUR), resume="auto")
    else:
        with pytest.raises(NotOursError, match=r"egspo-run is in the way"):
            train(runs.config(half, FOUR), resume="auto")


@pytest.mark.parametrize("option", [["--output-dir", ""], ["output_dir="], ["output_dir=' '"]])
def test_an_empty_output_dir_is_refused(
    option: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    recipe = tmp_path / "recipe.yaml"
    save_config(runs.config(tmp_path / "run", KL), recipe)
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), *option]) == 2
    assert "output_dir" in capsys.readouterr().err
    assert (tmp_path / "base").is_dir()


def test_begins_and_goes_on_by_one_command(finished: Path, tmp_path: Path, capsys: Any) -> None:
    """Killed before the first checkpoint, after it, and once more when all is done."""
    context: ForkServerContext = runs.forkserver()
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    save_config(runs.config(run, FOUR), recipe)
    command = ["train", str(recipe), "--resume", "auto"]
    for target, call in ((runs.ROLLOUT, 1), (runs.ROLLOUT, 3)):
        process = context.Process(
            target=runs.command_and_signal, args=(command, target, call, SIGKILL)
        )
        process.start()
        process.join(60)
        assert process.exitcode == -SIGKILL
    assert (run / "metrics.jsonl").read_text().count("\n") == 3
    assert main(["train", str(recipe)]) == 2 and "--resume" in capsys.readouterr().err
    assert main(command) == 0 and main(command) == 0
    assert outcome(run) == outcome(finished)
    assert not [path for path in run.rglob(".*") if path.name != ".egspo-run"]


def test_auto_passes_over_damage_and_does_not_begin_over_it(half: Path, finished: Path) -> None:
    newest, older = (half / "checkpoints" / f"step-00000{n}" for n in (3, 4))
    shutil.copytree(finished / "checkpoints" / "step-000004", older)
    (older / "optimizer.pt").write_bytes(b"")
    train(runs.config(half, FOUR), resume="auto")
    assert outcome(half) == outcome(finished)
    for path in (half / "checkpoints").glob("*"):
        (path / "optimizer.pt").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged"):
            train(runs.config(half, FOUR), resume="auto")
        for path in (half / "checkpoints").glob("*/manifest.json"):
            path.unlink()
    assert newest.exists() or older.exists()


@pytest.mark.parametrize("damage", [b"", b'{"step_map', b"\xff\xfe\x00", b"[" * 100_000, b"{}\n"])
def test_damaged_samples_are_set_aside(
    damage: bytes, half: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (half / "samples" / "step-000002.jsonl").write_bytes(damage)
    (half / "samples" / "step-²x.jsonl").write_bytes(damage)
    train(runs.config(half, FOUR), resume=half)
    assert outcome(half) == outcome(finished)
    (old,) = (half / "samples").glob("step-000002.jsonl.old-*")
    assert old.read_bytes() == damage and str(old) in caplog.text


@pytest.mark.parametrize("lines", [None, 2])
def test_missing_metrics_are_said_and_the_best_is_known(
    lines: int | None, half: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = half / "metrics.jsonl"
    if lines is None:
        file.unlink()
    else:
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))
    train(runs.config(half, FOUR), resume=half)
    missing = 3 if lines is None else 2
    assert f"has no record of {missing} earlier steps" in caplog.text
    best = [
        json.loads((run / "checkpoints" / "step-000004" / "state.json").read_text())["best"]
        for run in (half, finished)
    ]
    assert best[0] == best[1] is not None
    assert outcome(half)[1] == outcome(finished)[1]
    assert [r["step"] for r in read_metrics(half)][-1] == 4


def test_a_folder_that_is_deleted_ends_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    undo = strike(runs.ROLLOUT, 2, lambda: shutil.rmtree(run))
    try:
        with pytest.raises(RunLockedError, match="was deleted or emptied"):
            train(runs.config(run, FOUR))
    finally:
        undo()
    assert not run.exists()


def test_set_aside_twice_within_a_second_and_through_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "run", tmp_path / "run"
    real.mkdir(parents=True)
    link.symlink_to(real)
    kept = []
    for content in "abc":
        (link / "file").write_text(content)
        kept.append(set_aside(link))
        assert link.is_symlink() and not list(link.iterdir())
    assert [(old / "file").read_text() for old in kept] == list("abc")
    assert len(set(kept)) == 3 and {old.parent for old in kept} == {real.parent}


@pytest.mark.parametrize(
    "manifest",
    [
        *(
            "{}",
            "[]",
            '{"state.json": {"bytez": 1, "sha256": ""}}',
            '{"state.json": 3}',
            "[" * 10**5,
        ),
        *(json.dumps({name: {"bytes": 1, "sha256": ""}}) for name in ("../x", "/etc/passwd")),
    ],
)
def test_a_manifest_that_says_nothing_is_damage(manifest: str, half: Path) -> None:
    newest = half / "checkpoints" / "step-000003"
    (newest / MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match=r"step-000003 is damaged: manifest\.json"):
        train(runs.config(half, FOUR), resume=newest)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_has_is_damage(name: str, half: Path) -> None:
    newest = half / "checkpoints" / "step-000003"
    (newest / MANIFEST).write_text(json.dumps({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(CheckpointError, match=r"step-000003 is damaged: "):
        train(runs.config(half, FOUR), resume=newest)


@pytest.mark.parametrize("best", [3, "x", [], {"step": "x"}, {"reward": None}, {"other": 1}])
def test_a_best_step_that_is_none_does_not_fit(best: Any, half: Path) -> None:
    newest = half / "checkpoints" / "step-000003"
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**state, "best": best}))
    resealed(newest)
    with pytest.raises(CheckpointError, match=r"does not fit this run: state\.json"):
        train(runs.config(half, FOUR), resume=newest)


def resealed(checkpoint: Path) -> None:
    """The damage gets right checksums."""
    (checkpoint / MANIFEST).write_text(json.dumps(_inventory(checkpoint)))
    verify_published(checkpoint)


@pytest.mark.parametrize("kind", ["missing", "shape", "name", "torn", "optimizer", "state"])
@pytest.mark.parametrize(
    "changes", [{}, pytest.param(LORA, marks=pytest.mark.slow)], ids=["model", "adapter"]
)
def test_names_and_shapes_are_those_of_the_model(
    kind: str, changes: dict[str, Any], tmp_path: Path, finished: Path
) -> None:
    run = tmp_path / "run"
    if changes:
        train(runs.config(run, FOUR, changes))
    else:
        shutil.copytree(finished, run)
    newest = list_checkpoints(run / "checkpoints")[-1]
    older = list_checkpoints(run / "checkpoints")[-2]
    if kind in ("optimizer", "state"):
        (newest / {"optimizer": "optimizer.pt", "state": "state.json"}[kind]).write_bytes(b"{}")
    else:
        (file,) = newest.rglob("*.safetensors")
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensor = tensors.pop(name)
        if kind == "shape":
            tensors[name] = tensor[:1].clone()
        elif kind == "name":
            tensors[f"{name}x"] = tensor
        save_file(tensors, file)
        if kind == "torn":
            file.write_bytes(file.read_bytes()[:100])
    resealed(newest)
    with pytest.raises(CheckpointError, match=f"does not fit this run: .*{older} is intact"):
        train(runs.config(run, FOUR, changes), resume=run)


def test_starts_on_a_cold_cache_do_not_take_it_from_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second publishes while the first reads: what it reads stays."""
    target = tmp_path / "cache"

    def write(text: str) -> Any:
        return lambda folder: (folder / "model").write_text(text)

    publish(target, write("first"), replace=False)
    inode = (target / "model").stat().st_ino
    publish(target, write("second"), replace=False)
    assert (target / "model").stat().st_ino == inode
    (target / "model").write_text("torn")
    publish(target, write("third"), replace=False)
    assert (target / "model").read_text() == "third"
    (target / MANIFEST).write_text("{}")
    publish(target, write("fourth"), replace=False)
    assert (target / "model").read_text() == "fourth"
    assert not list(tmp_path.glob(".egspo-partial*"))


def test_a_full_disk_is_said_whoever_noticed_it(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0")

    with pytest.raises(OSError, match=r"final could not be saved: .*failed writing"):
        publish(tmp_path / "final", write)
    assert not list(tmp_path.iterdir())


def test_a_target_that_spells_the_mask_token_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "rewards", [runs.Reward("ones", runs.ones)])
    task = {"task": {"name": "letters", "options": {"target": "1<|mask|>"}}}
    with pytest.raises(ValueError, match="training example 0 spells the mask token"):
        train(runs.config(tmp_path, runs.LETTERS, task, {"sft": {"steps": 1}}))
