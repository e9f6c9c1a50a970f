from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from egspo.cli import main
from egspo.config.convert import ConfigError
from egspo.config.recipe import load_config
from egspo.evaluations import sweep as module
from egspo.evaluations.sweep import PLOT, TABLE, Run, load_sweep, plan, run_sweep
from egspo.runs.lock import LOCK
from egspo.training.trainer import train
from tests.helpers.runs import RECIPE, hold_elsewhere

VARIANTS = {"sa": ["algorithm.preset=egspo-sa"], "plain": ["algorithm.preset=egspo"]}


def write(folder: Path, **changes: object) -> Path:
    """A sweep of the tiny recipe."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    tree = {
        "recipe": "tiny.yaml",
        "variants": VARIANTS,
        "seeds": [3, 4],
        "overrides": ["steps=2"],
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were started, which train in this process."""
    runs: list[Run] = []

    def execute(run: Run, environment: Mapping[str, str]) -> int:
        runs.append(run)
        train(load_config(run.arguments[0], [*run.arguments[1:], f"output_dir={run.folder}"]))
        return 0

    monkeypatch.setattr(module, "_execute", execute)
    return runs


@pytest.mark.slow
def test_every_variant_with_every_seed_is_compared_once(
    tmp_path: Path, started: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    assert main(["sweep", str(path)]) == 0
    assert [(run.variant, run.seed) for run in started] == [
        ("sa", 3),
        ("plain", 3),
        ("sa", 4),
        ("plain", 4),
    ]
    table = (tmp_path / "out" / TABLE).read_text("utf-8")
    assert "| sa | 2 |" in table and "| plain | 2 |" in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "out" / PLOT).read_bytes().startswith(b"\x89PNG")
    saved = load_config(tmp_path / "out" / "plain" / "seed-4" / "config.yaml")
    assert (saved.seed, saved.steps, saved.algorithm.stepwise) == (4, 2, False)

    started.clear()
    run_sweep(load_sweep(path))
    assert not started  # all are finished

    with pytest.raises(ConfigError, match="another configuration"):
        run_sweep(load_sweep(write(tmp_path, overrides=["steps=3"])))


def test_one_sweep_at_a_time_writes_to_a_folder(
    tmp_path: Path, started: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    (tmp_path / "out").mkdir()
    hold_elsewhere(tmp_path / "out" / LOCK)
    assert main(["sweep", str(path)]) == 2
    assert f"output_dir {tmp_path / 'out'} is in use" in capsys.readouterr().err.replace("\n", " ")
    assert not started


def test_a_failed_run_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def execute(run: Run, environment: Mapping[str, str]) -> int:
        done.append(run.variant)
        return 7 if run.variant == "sa" else 0

    monkeypatch.setattr(module, "_execute", execute)
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed: sa seed 5 \(.*seed-5\.log\)"):
        run_sweep(load_sweep(write(tmp_path, seeds=[5])))
    assert done == ["sa", "plain"]


def test_an_interrupt_starts_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def execute(run: Run, environment: Mapping[str, str]) -> int:
        begun.append(run.seed)
        time.sleep(0.5 * (len(begun) - 1))  # the second runs while the first is reported
        return 0

    def interrupted(message: str, *_: object) -> None:
        if message.startswith("%s, seed"):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_execute", execute)
    monkeypatch.setattr(module.logger, "info", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(load_sweep(write(tmp_path, seeds=[1, 2, 3, 4])))
    assert len(begun) <= 2


def test_a_run_is_a_process_with_a_log(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, seeds=[0]))
    run = plan(sweep, Path(sweep.output_dir))[0]
    (tmp_path / "tiny.yaml").unlink()  # after the plan was checked
    assert module._execute(run, os.environ) == 2
    assert "there is no recipe" in run.log.read_text("utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "variants must not be empty"),
        ({"seeds": []}, "seeds must not be empty"),
        ({"seeds": [1, 1]}, r"seeds must be distinct, got \[1, 1\]"),
        ({"variants": {"a/b": []}}, "'a/b' cannot be the name of a folder"),
        ({"variant": {}}, r"variant: unknown key; did you mean variants\?"),
        ({"variants": {"a": ["algorithm.presett=egspo"]}}, r"did you mean algorithm\.preset"),
        ({"recipe": "tini.yaml"}, r"did you mean .*tiny\.yaml"),
    ],
)
def test_bad_sweeps(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        sweep = load_sweep(write(tmp_path, **changes))
        plan(sweep, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_sweeps_of_the_project_are_valid() -> None:
    files = sorted((Path(__file__).parents[2] / "recipes" / "sweeps").glob("*.yaml"))
    assert files
    for file in files:
        sweep = load_sweep(file)
        runs = plan(sweep, Path(sweep.output_dir) / "none")
        assert len(runs) == len(sweep.seeds) * len(sweep.variants)


def test_jobs_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs must be >= 1, got 0"):
        run_sweep(load_sweep(write(tmp_path)), jobs=0)
