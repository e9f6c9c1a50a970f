"""The sample table: on the run's page, in TensorBoard and in W&B."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import WandBTracker

from egspo.config import GenerationConfig
from egspo.inspection.sample_table import (
    MOST_CHARACTERS,
    SAMPLE_PAGE,
    SampleTable,
    markdown_table,
    plain_table,
)
from egspo.runs.metrics import read_metrics
from egspo.runs.samples import SelectedStep, TrajectoryRecord, list_samples, read_trajectories
from egspo.tasks import Reward
from egspo.training.trainer import train
from tests.helpers import runs
from tests.inspection.test_inspect import Page

HOSTILE = (
    "</td></table><script>alert(1)</script><img src=http://x.test/a onerror=alert(1)>"
    "| a | b |\n---|---\n# *big* [link](http://x.test) ![i](http://x.test) <http://x.test> "
    "`code` \\| &lt; \x00\x1b[31m\u202egnp\ud800 http://x.test"
)
SHOWN = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b")
SHOWN = SHOWN.replace("\u202e", "\\x202e").replace("\ud800", "\\xd800")


def record(**values: Any) -> TrajectoryRecord:
    given: dict[str, Any] = {
        "index": 0,
        "completion": "4",
        "finish_reason": "eos",
        "tokens": 1,
        "generation": GenerationConfig(max_new_tokens=4, steps=4, block_length=4),
        "step_map": [],
        "prompt": "2 + 2?",
        "prompt_index": 7,
        "reward": 1.0,
        "rewards": {"correct": 1.0},
        "selected": [SelectedStep(1, 3, -0.5), SelectedStep(0, 2, 0.25)],
    }
    return TrajectoryRecord(**{**given, **values})


GROUP = [
    record(),
    record(index=1, completion="5", reward=0.25, rewards={"form": 0.25}, selected=[]),
]


def test_rows_have_a_column_for_every_reward() -> None:
    columns, rows = plain_table(10, GROUP)
    assert columns == [
        *("step", "prompt", "completion", "reward", "reward/correct", "reward/form"),
        *("selected steps", "advantage"),
    ]
    assert rows == [
        [10, "2 + 2?", "4", 1.0, 1.0, None, "2 3", "+0.250 -0.500"],
        [10, "2 + 2?", "5", 0.25, None, 0.25, "", ""],
    ]


def test_a_chat_names_its_roles() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert plain_table(1, [record(messages=messages)])[1][0][1] == (
        "system: be brief\n\nuser: hello"
    )


def test_the_page_grows_and_stands_alone(tmp_path: Path) -> None:
    table = SampleTable(tmp_path)
    table.add(10, GROUP)
    table.add(20, [record(completion="six\n  6", reward=None, rewards={})])
    text = (tmp_path / SAMPLE_PAGE).read_text("utf-8")
    page = Page(text)
    assert [list(each) for each in page.named("details")] == [["open"], []]  # the newest first
    shown = "".join(page.text)
    assert shown.index("step 20") < shown.index("step 10")
    assert "· prompt 7 · 2 completions · mean reward 0.625" in shown
    assert "six\n  6" in page.text and "+0.250" in page.text and "-0.500" in page.text
    assert len(page.named("td", "text")) == 3
    assert "http" not in text.replace("http-equiv", "") and not page.named("script")
    assert list(tmp_path.iterdir()) == [tmp_path / SAMPLE_PAGE]


def test_hostile_text_is_only_text_on_the_page(tmp_path: Path) -> None:
    hostile = record(
        completion=HOSTILE,
        messages=[{"role": "<b>user", "content": HOSTILE}],
        rewards={"<i>": 1.0},
    )
    (run := tmp_path / "<u>").mkdir()
    SampleTable(run).add(1, [hostile])
    page = Page((run / SAMPLE_PAGE).read_text("utf-8"))
    assert SHOWN in page.text and f"<b>user: {SHOWN}" in page.text
    assert {"<i>", "<u> · samples"} <= set(page.text)
    tags = {tag for tag, _ in page.tags}
    assert tags <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "p", "details", "summary"),
        *("span", "pre", "table", "tr", "th", "td", "br"),
    }


def test_hostile_text_is_only_text_in_tensorboard() -> None:
    """By TensorBoard's own rendering, which would load an image or follow a link."""
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    columns, rows = plain_table(3, [record(completion=HOSTILE, rewards={"a|b": 0.5}), *GROUP])
    page = Page(plugin_util.markdown_to_safe_html(markdown_table(columns, rows)))
    tags = {tag for tag, _ in page.tags}
    assert tags == {"table", "thead", "tbody", "tr", "th", "td", "br"}
    assert len(page.named("tr")) == 4 and len(page.named("td")) == 3 * len(columns)
    text = "".join(page.text)
    assert all(line in text for line in SHOWN.split("\n"))
    assert "reward/a|b" in page.text and "+0.250 -0.500" in page.text


def test_what_is_huge_is_cut(tmp_path: Path) -> None:
    table = SampleTable(tmp_path)
    huge = record(completion="y" * (MOST_CHARACTERS + 12_345), prompt="z" * 10**6)
    for step in range(3):
        table.add(step, [huge] * 8)
    page = (tmp_path / SAMPLE_PAGE).read_text("utf-8")
    assert page.count("y" * MOST_CHARACTERS + " … (12,345 more characters)") == 24
    assert len(page) < 3 * 10 * MOST_CHARACTERS
    assert len(str(plain_table(0, [huge])[1][0][2])) < MOST_CHARACTERS + 50


class Recorder:
    """A tracker that shows scalars only, or tables too."""

    name = "recorder"


def test_a_tracker_without_tables_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "egspo"):
        table = SampleTable(tmp_path, [Recorder()])
        table.add(1, GROUP)
        table.add(2, GROUP)
    assert [r.message for r in caplog.records] == [
        "the sample table is not sent to recorder, which shows none"
    ]


# --- Runs


@pytest.fixture(autouse=True)
def two_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
    partial = Reward("ones", runs.partial_ones)
    monkeypatch.setattr(runs, "rewards", [Reward("value", runs.varied), partial])


def test_a_run_has_the_table_in_tensorboard_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(runs.config(tmp_path, runs.LETTERS, {"trackers": ["tensorboard"]}))
    samples = {step: read_trajectories(file) for step, file in list_samples(tmp_path).items()}
    assert list(samples) == [2, 4]
    group = samples[4]
    assert {name for each in group for name in each.rewards} >= {"value"}
    for each in group:
        assert each.rewards["value"] == pytest.approx(runs.varied([each.completion])[0])
        assert each.reward == pytest.approx(sum(each.rewards.values()))
    page = Page((tmp_path / SAMPLE_PAGE).read_text("utf-8"))
    assert len(page.named("details")) == 2 and len(page.named("td", "text")) == 8

    events = EventAccumulator(str(tmp_path / "egspo"))
    events.Reload()
    sent = events.Tensors("samples/text_summary")
    expected = {step: markdown_table(*plain_table(step, samples[step])) for step in samples}
    assert {e.step: e.tensor_proto.string_val[0].decode() for e in sent} == expected
    means = [r["reward/mean"] for r in read_metrics(tmp_path)[1:]]
    assert [e.value for e in events.Scalars("reward/mean")] == pytest.approx(means)


EVERY_STEP = {"steps": 3, "eval": {"every": 1}, "checkpoint": {"every": 1}}


def _fail() -> None:
    raise OSError("no")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_run_has_the_same_page(elsewhere: bool, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole" / "run", tmp_path / "stopped" / "run"
    train(runs.config(whole, runs.LETTERS, EVERY_STEP))
    undo = runs.strike("egspo.training.trainer.evaluate", 3, _fail)
    with pytest.raises(OSError, match="no"):  # when step 2 is on the page, and not yet whole
        train(runs.config(stopped, runs.LETTERS, EVERY_STEP))
    undo()
    assert len(Page((stopped / SAMPLE_PAGE).read_text("utf-8")).named("details")) == 2
    output = tmp_path / "elsewhere" / "run" if elsewhere else stopped
    train(runs.config(output, runs.LETTERS, EVERY_STEP), resume=stopped)
    page = (output / SAMPLE_PAGE).read_bytes()
    assert page == (whole / SAMPLE_PAGE).read_bytes()
    assert len(Page(page.decode()).named("details")) == 3
    for folder in (whole, output):
        assert list(list_samples(folder)) == [1, 2, 3]
    for file, other in zip(*(list_samples(f).values() for f in (whole, output)), strict=True):
        assert file.read_bytes() == other.read_bytes()


@pytest.mark.slow  # W&B starts a process of its own
def test_wandb_gets_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By W&B itself, which writes to a folder and sends nothing."""
    pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = WandBTracker("egspo")
    tracker.start()
    SampleTable(tmp_path, [tracker]).add(10, GROUP)
    tracker.finish()
    (file,) = tmp_path.rglob("*.table.json")
    columns, rows = plain_table(10, GROUP)
    sent = json.loads(file.read_text("utf-8"))
    assert (sent["columns"], sent["data"]) == (columns, rows)
