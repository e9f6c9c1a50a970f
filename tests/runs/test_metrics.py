from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from egspo.config import ModelConfig, TrainConfig
from egspo.config.recipe import save_config
from egspo.inspection.plotting import (
    ComparisonRow,
    comparison_table,
    mean_interval,
    plot_comparison,
    plot_run,
)
from egspo.runs.metrics import MetricsWriter, deterministic, read_metrics
from egspo.training.progress import RunProgress


def write_run(folder: Path, rewards: list[float], **more: Any) -> Path:
    writer = MetricsWriter(folder / "metrics.jsonl")
    for step, reward in enumerate(rewards):
        writer.write({"step": step, "eval/reward": reward, **more})
    return folder


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])


def test_records_come_back_with_null_for_what_json_lacks(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "new" / "metrics.jsonl")
    writer.write({"step": 0, "kl": math.nan, "ü/histogram": [1, -math.inf]})
    writer.write({"step": 1, "reward/mean": 0.1})
    assert read_metrics(tmp_path / "new") == [
        {"step": 0, "kl": None, "ü/histogram": [1, None]},
        {"step": 1, "reward/mean": 0.1},
    ]


@pytest.mark.parametrize("step", [None, -1, 1.0, True, "1"])
def test_a_record_needs_a_step(tmp_path: Path, step: object) -> None:
    with pytest.raises(ValueError, match="integer step"):
        MetricsWriter(tmp_path / "metrics.jsonl").write({"step": step})


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MetricsWriter(None, resume_after=3).write({"step": 0})
    assert list(tmp_path.iterdir()) == []


def test_resuming_keeps_dropped_lines_and_torn_ones_aside(tmp_path: Path) -> None:
    path = write_run(tmp_path, [0.0, 0.1, 0.2, 0.3]) / "metrics.jsonl"
    with path.open("a") as stream:
        stream.write('{"step": 4, "eval/rew')
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]

    writer = MetricsWriter(path, resume_after=1)
    writer.write({"step": 2, "eval/reward": 9.0})
    assert [record["eval/reward"] for record in read_metrics(path)] == [0.0, 0.1, 9.0]
    dropped = (tmp_path / "metrics.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in dropped[:2]] == [2, 3]
    assert dropped[2:] == ['{"step": 4, "eval/rew']

    MetricsWriter(path, resume_after=2)
    assert len((tmp_path / "metrics.dropped.jsonl").read_text().splitlines()) == 3
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]
    MetricsWriter(path)  # not resumed: nothing is kept, nothing is lost
    assert read_metrics(path) == []
    assert len((tmp_path / "metrics.dropped.jsonl").read_text().splitlines()) == 6
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "metrics.dropped.jsonl",
        "metrics.jsonl",
    ]


def test_every_truncation_is_readable_and_resumable(tmp_path: Path) -> None:
    path = write_run(tmp_path, [0.25, 0.5, 0.75]) / "metrics.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = whole[: size + 1].count(b"\n")  # the line break itself may be missing
        assert len(read_metrics(path)) == complete
        MetricsWriter(path, resume_after=9).write({"step": 9})
        assert [record["step"] for record in read_metrics(path)] == [*range(complete), 9]


def test_a_damaged_line_in_the_middle_is_an_error_to_read_and_set_aside_to_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
    for read in (read_metrics, plot_run_beside):
        with pytest.raises(ValueError, match="line 2 is not a record"):
            read(path)
    assert path.read_text().count("\n") == 3
    writer = MetricsWriter(path, resume_after=3)
    assert "line 2 is damaged and set aside" in caplog.text
    assert [record["step"] for record in read_metrics(path)] == [0, 2]
    assert path.with_suffix(".dropped.jsonl").read_text() == '{"ste\n'
    writer.warn_of_missing(range(1, 4))
    assert "no record of 2 earlier steps (the first is 1, the last 3)" in caplog.text


def plot_run_beside(path: Path) -> Path:
    return plot_run(path, path.with_suffix(".png"))


def test_missing_metrics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="output_dir of a run"):
        read_metrics(tmp_path)


def test_deterministic_leaves_the_clock_out() -> None:
    record = {"step": 1, "time/rollout": 0.1, "speed/tokens_per_second": 5.0, "timely": 2}
    assert deterministic(record) == {"step": 1, "timely": 2}


FULL = {
    **{"reward/mean": 0.5, "entropy/mean": 0.3, "selected/entropy": 0.4, "kl": 0.01},
    **{"clip/low": 0.0, "clip/high": 0.1, "grad_norm": 1.5, "eval/solved": 0.2},
    **{"selected/histogram": [1, 0, 3]},
}


@pytest.mark.parametrize("steps", [1, 2, 60])
@pytest.mark.parametrize(
    "more",
    [{}, FULL, {**FULL, "kl": None, "grad_norm": None, "selected/histogram": [0, 0, 0]}],
    ids=["little", "full", "nulls"],
)
def test_plots_of_runs(tmp_path: Path, steps: int, more: dict[str, Any]) -> None:
    run = write_run(tmp_path, [0.1 + step / 100 for step in range(steps)], **more)
    target = tmp_path / "figures" / "curves.png"
    assert plot_run(run, target) == target
    assert png_size(target)[0] == 1200
    assert [file.name for file in target.parent.iterdir()] == ["curves.png"]


def test_plot_does_not_depend_on_a_readable_configuration(tmp_path: Path) -> None:
    run = write_run(tmp_path, [0.1, 0.2])
    plain = plot_run(run, tmp_path / "plain.png").read_bytes()
    (run / "config.yaml").write_text("of: another version\n")
    assert plot_run(run, tmp_path / "other.png").read_bytes() == plain
    save_config(TrainConfig(ModelConfig(path="m")), run / "config.yaml")
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 0
    assert plot_run(run, tmp_path / "titled.png").read_bytes() != plain


def test_a_run_without_a_complete_record_has_no_plot(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"ste')
    with pytest.raises(ValueError, match="no complete record"):
        plot_run(tmp_path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("count", "quantile"), [(2, 12.7062), (5, 2.7764), (11, 2.2281), (12, 2.2010), (31, 2.0423)]
)
def test_intervals_are_students(count: int, quantile: float) -> None:
    values = [float(i) for i in range(count)]
    mean, half = mean_interval(values)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    assert half == pytest.approx(quantile * math.sqrt(variance / count), rel=2e-4)
    assert mean_interval([0.5]) == (0.5, None)


def test_comparison_of_methods(tmp_path: Path) -> None:
    groups = {
        "egspo-sa": [
            write_run(tmp_path / f"a{seed}", [0.1, 0.5, last], **{"eval/solved": last / 2})
            for seed, last in enumerate([0.6, 0.8])
        ],
        "egspo": [write_run(tmp_path / "b", [0.1, 0.2, 0.3])],
    }
    rows = plot_comparison(groups, tmp_path / "comparison.png", title="Sudoku")
    assert png_size(tmp_path / "comparison.png") == (840, 528)
    sa, plain = rows
    assert (sa.method, sa.seeds, sa.reward, sa.solved) == ("egspo-sa", 2, 0.7, 0.35)
    assert sa.reward_interval == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert plain == ComparisonRow("egspo", 1, 0.3, None, None, None, None, None)
    assert comparison_table(rows).splitlines() == [
        "| Method | Seeds | TFLOP | Processor-seconds | Held-out reward | Solved |",
        "|---|--:|--:|--:|--:|--:|",
        "| egspo-sa | 2 | - | - | 0.700 ± 1.271 | 35.0 ± 63.5 % |",
        "| egspo | 1 | - | - | 0.300 | - |",
    ]


def test_comparison_at_equal_cost(tmp_path: Path) -> None:
    """Runs of different lengths, each step of which cost something else."""
    phases = {"flops/rollout": 5e11, "flops/score": 2e11, "flops/update": 3e11}
    phases["time/processor"] = 8.0
    cheap = {name: value / 4 for name, value in phases.items()}
    groups = {
        "dear": [write_run(tmp_path / "a", [0.1, 0.2, 0.3], **phases)],
        "cheap": [write_run(tmp_path / "b", [0.1] * 9, **cheap)],
    }
    with pytest.raises(ValueError, match="different last evaluations"):
        plot_comparison(groups, tmp_path / "comparison.png")
    rows = plot_comparison(groups, tmp_path / "comparison.png", x=["flops", "seconds"])
    assert png_size(tmp_path / "comparison.png") == (1320, 528)
    assert [row.tflops for row in rows] == pytest.approx([3.0, 2.25])
    assert [row.seconds for row in rows] == [24.0, 18.0]
    assert "| dear | 1 | 3 | 24 |" in comparison_table(rows)


def test_incomparable_runs_are_refused(tmp_path: Path) -> None:
    done, unfinished = (write_run(tmp_path / name, [0.0] * n) for name, n in (("a", 3), ("b", 2)))
    with pytest.raises(ValueError, match=r"a at step 2, .*b at step 1"):
        plot_comparison({"x": [done], "y": [unfinished]}, tmp_path / "comparison.png")
    with pytest.raises(ValueError, match="at least one run"):
        plot_comparison({"x": []}, tmp_path / "comparison.png")
    MetricsWriter(tmp_path / "c" / "metrics.jsonl").write({"step": 0})
    with pytest.raises(ValueError, match="no held-out reward"):
        plot_comparison({"x": [tmp_path / "c"]}, tmp_path / "comparison.png")


def shown(terminal: bool, **options: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, _environ={})
    with RunProgress(100, "EGSPO", console=console, **options) as progress:
        for step in range(options.get("start", 0) + 1, 101):
            values = {"reward/mean": step / 100, "kl": None}
            progress.update(step, values | ({"eval/reward": 0.25} if step == 7 else {}))
    return stream.getvalue()


def test_progress_without_terminal_is_lines() -> None:
    lines = shown(terminal=False).splitlines()
    assert [line.split()[1] for line in lines][:3] == ["5/100", "7/100", "10/100"]
    assert len(lines) == 21
    assert lines[0].startswith("EGSPO 5/100  reward 0.05  elapsed 0:00  left 0:00")
    assert lines[1].startswith("EGSPO 7/100  reward 0.07  held-out reward 0.25  elapsed")
    assert "left" not in lines[-1]


def test_progress_on_a_terminal_is_a_bar_and_disabled_is_silent() -> None:
    assert "100/100" in shown(terminal=True, start=50)
    assert shown(terminal=True, enabled=False) == shown(terminal=False, enabled=False) == ""


def test_progress_speaks_up_when_steps_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 61.0)
    fake = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("egspo.training.progress.time", fake)
    assert len(shown(terminal=False).splitlines()) == 100


def test_progress_refuses_impossible_ranges() -> None:
    with pytest.raises(ValueError, match="0 <= start <= total"):
        RunProgress(5, "EGSPO", start=6)


@pytest.mark.parametrize(
    "line",
    [
        *('{"step": 3, "loss": "x"}', '{"step": 3, "loss": [1]}', '{"step": 3, "loss": {}}'),
        *('{"step": true}', '{"step": -1}', '{"step": 1e3}', f'{{"step": {10**30}}}'),
    ],
)  # fmt: skip
def test_a_record_of_what_is_no_number_is_damaged(line: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(file)
    writer.write({"step": 1, "loss": 0.5, "selected/histogram": [1, 2], "kl": None})
    text = file.read_text()
    file.write_text(f"{line}\n{text}")
    with pytest.raises(ValueError, match="line 1 is not a record"):
        read_metrics(file)
    MetricsWriter(file, resume_after=1)
    assert file.read_text() == text
    assert (tmp_path / "metrics.dropped.jsonl").read_text() == f"{line}\n"
