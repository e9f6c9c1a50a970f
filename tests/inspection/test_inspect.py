"""Trajectories that runs keep, and how ``egspo inspect`` shows them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from egspo.cli import main
from egspo.config import GenerationConfig
from egspo.inspection.layout import blocks_of, differences, steps_shown, visible
from egspo.inspection.page import trajectory_page
from egspo.inspection.terminal import StepMapView, trajectory_view
from egspo.rollouts.completion import TokenStep
from egspo.runs.metrics import read_metrics
from egspo.runs.samples import (
    SelectedStep,
    TrajectoryRecord,
    list_samples,
    read_trajectories,
    write_group,
)
from egspo.tasks import Reward
from egspo.training.trainer import train
from tests.helpers import runs

GROUP = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A run of EGSPO-SA, one of EGSPO, and one that has nothing to learn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
        folder = tmp_path_factory.mktemp("runs")
        done = {}
        for name, algorithm, reward in (
            ("stepwise", {}, runs.varied),
            ("plain", {"stepwise": False}, runs.varied),
            ("idle", {"stepwise": False}, lambda completions, **_: [0.5] * len(completions)),
        ):
            runs.rewards[:] = [Reward("value", reward)]
            changes = {"algorithm": algorithm, "steps": 5, "eval": {"every": 2}}
            done[name] = folder / name
            train(runs.config(done[name], runs.LETTERS, changes))
        runs.rewards.clear()
        yield done


# --- What a run keeps


@pytest.mark.parametrize("name", ["stepwise", "plain", "idle"])
def test_a_run_keeps_a_group_at_every_evaluation(name: str, trained: dict[str, Path]) -> None:
    samples = list_samples(trained[name])
    evaluated = [r["step"] for r in read_metrics(trained[name]) if "eval/reward" in r]
    assert list(samples) == evaluated[1:] == [2, 4, 5]
    for file in samples.values():
        assert len(file.read_text().splitlines()) == GROUP
        group = read_trajectories(file)
        assert [record.index for record in group] == list(range(GROUP))
        assert len({record.prompt_index for record in group}) == 1
        for record in group:
            check(record, name)


def check(record: TrajectoryRecord, name: str) -> None:
    """One trajectory against what it must add up to."""
    assert record.chat == [
        {"role": "user", "content": "1234"[: 1 + (record.prompt_index or 0) % 4]}
    ]
    text = "".join(token.text for token in record.step_map[: record.tokens])
    special = re.compile(r"<\|\w+\|>")
    assert special.sub("", text) == record.completion
    entropy = record.entropy
    assert len(entropy) == record.steps
    assert entropy == pytest.approx(replace(record, step_entropy=None).entropy, rel=1e-5)
    reward = 0.5 if name == "idle" else runs.varied([record.completion])[0]
    assert record.reward == pytest.approx(reward)
    if name == "idle":
        assert not record.selected
        return
    ranked = sorted(record.selected, key=lambda selected: selected.rank)
    assert [selected.rank for selected in ranked] == list(range(len(ranked)))
    values = [entropy[selected.step] for selected in ranked]
    assert values == sorted(values, reverse=True) and ranked
    for selected in ranked:
        assert selected.advantage is not None
        if name == "plain":
            assert selected.completion is selected.reward is record.step_reward is None
            continue
        assert selected.completion is not None
        assert selected.reward == pytest.approx(runs.varied([selected.completion])[0])
        assert record.step_reward == record.reward


def test_advantages_of_a_kept_group_are_centred(trained: dict[str, Path]) -> None:
    for file in list_samples(trained["plain"]).values():
        group = read_trajectories(file)
        for rank in range(3):  # over the members that have a step of that rank
            chosen = [
                (record.reward or 0, selected.advantage)
                for record in group
                for selected in record.selected
                if selected.rank == rank
            ]
            mean = sum(reward for reward, _ in chosen) / max(len(chosen), 1)
            for reward, advantage in chosen:
                assert advantage == pytest.approx(reward - mean)


def test_a_resumed_run_keeps_the_same(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
    monkeypatch.setattr(runs, "rewards", [Reward("value", runs.varied)])
    output = tmp_path / "run"
    changes = {"steps": 5, "eval": {"every": 2}}
    undo = runs.strike(runs.ROLLOUT, 5, lambda: (_ for _ in ()).throw(OSError("no")))
    # A second call in each evaluation's module is not counted: it has its own name.
    with pytest.raises(OSError, match="no"):
        train(runs.config(output, runs.LETTERS, changes))
    undo()
    assert list(list_samples(output)) == [2, 4]
    (output / "samples" / ".egspo-partial-step-000005.jsonl-1").write_text("{")  # of a kill
    train(runs.config(output, runs.LETTERS, changes), resume=output)
    kept = {step: file.read_bytes() for step, file in list_samples(output).items()}
    assert kept == {s: f.read_bytes() for s, f in list_samples(trained["stepwise"]).items()}
    assert len(list((output / "samples").iterdir())) == 3


# --- Reading


def token(position: int, step: int, text: str = "x", **values: Any) -> TokenStep:
    return TokenStep(position, values.pop("token_id", 5), text, step, 0.5, values.pop("entropy", 1))


def long_record(blocks: int = 8, width: int = 32) -> TrajectoryRecord:
    """Two tokens a step, the last block half full of EOS."""
    length = blocks * width
    tokens = [
        token(
            i,
            (i // width) * (width // 2) + (i * 7 % width) // 2,
            text="<eos>" if i >= length - width // 2 else f" w{i}",
            token_id=0 if i >= length - width // 2 else 5,
            entropy=1 + math.sin(i),
        )
        for i in range(length)
    ]
    return TrajectoryRecord(
        index=0,
        completion="".join(t.text for t in tokens if t.token_id),
        finish_reason="eos",
        tokens=length - width // 2,
        generation=GenerationConfig(max_new_tokens=length, steps=length // 2, block_length=width),
        step_map=tokens,
        prompt="How many [bold]words[/]?",
        reward=1.0,
        step_reward=1.0,
        selected=[
            SelectedStep(0, 70, 0.25, " w0 other", 0.5),
            SelectedStep(1, 3, -0.5, " w0", 0.0),
        ],
    )


def test_records_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    record = long_record()
    bare = replace(record, index=1, selected=[], reward=None, step_reward=None, prompt=None)
    odd = replace(bare, index=2, step_entropy=[0.5, None], completion="猫\n\u2028")
    assert read_trajectories(write_group(tmp_path, 3, [record, bare, odd])) == [record, bare, odd]
    assert math.isnan(odd.entropy[1])
    beyond = replace(record, step_entropy=[0.5, None])
    file = write_group(tmp_path, 4, [bare, beyond])
    with pytest.raises(ValueError, match=r"step-000004\.jsonl, line 2 selects step 70 of 2"):
        read_trajectories(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no trajectories"),
        ("\n{", "line 2 is not valid JSON"),
        ('{"index": 0, "completion": "1"}', "line 1 has no step_map: .*--step-map"),
        ('{"index": 0, "step_map": []}', "line 1: .* problems\n.*completion: required"),
    ],
)
def test_what_is_no_trajectory(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trajectories(file)


def test_blocks_and_the_steps_that_matter() -> None:
    record = long_record()
    blocks = blocks_of(record)
    assert [block.positions for block in blocks] == [range(32 * b, 32 * b + 32) for b in range(8)]
    assert [block.steps for block in blocks] == [range(16 * b, 16 * b + 16) for b in range(8)]
    assert steps_shown(record, every_step=False) == {3, 70, *range(15, 128, 16)}
    assert steps_shown(record, every_step=True) == set(range(128))
    assert steps_shown(long_record(1), every_step=False) == set(range(16))


def test_visible_text_does_not_steer_a_terminal() -> None:
    assert visible("a\tb\n") == "a⇥b↵"
    assert visible("\x1b[31m\x07é猫") == "\\x1b[31m\\x07é猫"
    assert visible("") == "▫"


def test_differences() -> None:
    assert list(differences("1239", "1234")) == [("123", False), ("9", True)]
    assert "".join(piece for piece, _ in differences("kitten", "sitting")) == "kitten"


# --- Terminal


def shown(record: TrajectoryRecord, group: Sequence[TrajectoryRecord] = (), **options: Any) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(trajectory_view(record, group=group or [record], source="test", **options))
    return console.export_text()


def test_a_long_trajectory_fits_a_terminal() -> None:
    text = shown(long_record())
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert len(lines) < 90
    for part in ("How many [bold]words[/]?", "240 of 256 tokens", "128 steps", "10 of 128 steps"):
        assert part in text
    assert "block 8 of 8, positions 224 to 255" in text and "∎∎∎" in text
    assert len(shown(long_record(), every_step=True).splitlines()) > 128


def test_the_canvas_marks_what_each_step_revealed() -> None:
    record = TrajectoryRecord(
        index=0,
        completion="ab",
        finish_reason="eos",
        tokens=2,
        generation=GenerationConfig(max_new_tokens=4, steps=4, block_length=4),
        step_map=[
            token(0, 1, "a"),
            token(1, 0, "b"),
            *(token(i, 2, "", token_id=0) for i in (2, 3)),
        ],
        selected=[SelectedStep(0, 1, 0.5, "aa", 0.25)],
        reward=1.0,
    )
    lines = [line.split() for line in shown(record).splitlines()]
    assert ["0", "1.000", "·[b]··"] in lines
    assert ["1", "#1", "1.000", "[a]b··"] in lines
    assert ["2", "1.000", "ab[∎][∎]"] in lines
    assert ["#1", "1", "1.000", "0.250", "+0.750", "+0.500", "0", "a"] in lines
    assert ["#1", "1", "0.250", "aa"] in lines


def test_a_view_without_training_lacks_what_only_training_knows() -> None:
    text = shown(replace(long_record(), selected=[], reward=None, step_reward=None))
    for absent in ("selected", "one-step", "reward", "group", "#1"):
        assert absent not in text


def test_step_maps_wrap_in_columns() -> None:
    console = Console(width=40, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    tokens = [token(i, i, text) for i, text in enumerate(["a", "猫", "a long word", *"bcdefgh"])]
    console.print(StepMapView(tokens))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0].split() == ["position", "0", "1", "2", "3"]
    assert lines[1].split() == ["token", "a", "猫", "a", "long", "wo…", "b"]
    assert lines[2].split() == ["step", "0", "1", "2", "3"]
    assert lines[6].split() == ["position", "4", "5", "6", "7", "8"]


# --- Page


class Page(HTMLParser):
    """Tags of a page, which must be balanced, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and (kind is None or a.get("class") == kind)]


def test_a_page_stands_alone_and_escapes_what_it_shows() -> None:
    record = replace(long_record(), prompt='<script>alert(1)</script> & "x"')
    record.step_map[0] = token(0, 0, '</span><img src="x">')
    text = trajectory_page(record, group=[record], source="<b>")
    page = Page(text)
    assert not page.named("img") and len(page.named("script")) == 1
    assert '<script>alert(1)</script> & "x"' in page.text
    assert '</span><img src="x">' in page.text
    for tag, attributes in page.tags:
        assert not {"src", "href"} & set(attributes), tag
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert len(page.named("span", "t")) == 256
    assert len([i for i in page.named("i")]) == 128
    assert [i["data-s"] for i in page.named("i", "pick")] == ["3", "70"]
    assert [row["data-s"] for row in page.named("tr") if "data-s" in row] == ["70", "3"]


# --- egspo inspect


def test_inspecting_a_run(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(trained["stepwise"])
    assert main(["inspect", run]) == 0
    newest = capsys.readouterr().out
    assert newest.startswith("stepwise, step 5 · prompt ")
    for part in ("step entropy", "canvas", "selected steps", "one-step completions", "group"):
        assert f"\n{part}" in newest
    assert "\x1b" not in newest
    assert main(["inspect", run, "--step", "2", "--index", "3"]) == 0
    assert "step 2 · prompt" in (other := capsys.readouterr().out)
    assert "completion 3 of 4" in other
    assert main(["inspect", run, "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["step", "2", "4", "5"]
    assert main(["inspect", run, "--list", "--step", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + GROUP
    page, figure = tmp_path / "out" / "page.html", tmp_path / "out" / "figure.png"
    assert main(["inspect", run, "--html", str(page), "--png", str(figure)]) == 0
    assert capsys.readouterr().out == f"{page}\n{figure}\n"
    assert Page(page.read_text()).named("tr")
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(page.parent.iterdir()) == [figure, page]


@pytest.mark.parametrize("name", ["plain", "idle"])
def test_inspecting_runs_that_know_less(
    name: str, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, png = str(trained[name]), str(tmp_path / "f.png")
    assert main(["inspect", run]) == 0
    text = capsys.readouterr().out
    assert ("selected steps" in text) == (name == "plain")
    assert "one-step" not in text
    assert main(["inspect", run, "--png", png, "--html", str(tmp_path / "p.html")]) == 0


def test_inspecting_what_generate_wrote(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = str(trained["stepwise"]), tmp_path / "answers.jsonl"
    prompts = ["--prompt", "1", "--prompt", "12"]
    options = ["--step-map", "--output", str(output)]
    assert main(["generate", "--model", model, *prompts, *options]) == 0
    capsys.readouterr()
    assert main(["inspect", str(output), "--index", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("answers.jsonl · prompt 1\n") and "\nprompt\n  12" in text
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record.completion for record in read_trajectories(output)] == [
        line["completion"] for line in written
    ]
    assert main(["generate", "--model", model, "--prompt", "1", "--step-map"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines[-5:]] == [
        *("position", "token", "step", "confidence", "entropy")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "there is no run and no file"),
        (["{tmp}"], "has no trajectories (samples/step-*.jsonl)"),
        (["{tmp}", "--list"], "has no trajectories (samples/step-*.jsonl)"),
        (["{run}", "--step", "3"], "has no trajectories of step 3; it has those of 2, 4, 5"),
        (["{run}", "--index", "4"], "has no trajectory 4; it has 0, 1, 2, 3"),
        (["{file}", "--step", "2"], "--step chooses a training step of a run"),
    ],
)
def test_what_cannot_be_inspected(
    arguments: list[str],
    message: str,
    trained: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = trained["stepwise"]
    places = {"tmp": tmp_path, "run": run, "file": list_samples(run)[2]}
    assert main(["inspect", *(text.format(**places) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
