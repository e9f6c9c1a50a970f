"""``egspo data``: what two sets share, and what is in a task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from egspo.cli import main
from egspo.tasks import files
from egspo.tasks.base import unregister_task
from egspo.tasks.overlap import overlap
from tests.tasks.test_task_files import write as write_task

A = ["How many?", "How  MANY", "Who?", "When?"]
B = ["how many", "Where?", "Who?"]


def write(path: Path, questions: list[str], column: str = "question") -> str:
    path.write_text("".join(json.dumps({column: text, "n": 1}) + "\n" for text in questions))
    return str(path)


def code(*arguments: str) -> int:
    try:
        return main(["data", *arguments])
    except SystemExit as exit:
        assert isinstance(exit.code, int)
        return exit.code


def test_counts() -> None:
    found = overlap(A, B, examples=1)
    assert (found.size, found.distinct) == ((4, 3), (3, 3))
    assert (found.exact, found.normalised) == ((1, 1), (3, 2))
    assert found.examples == [("How many?", "how many")]
    assert len(overlap(A, B).examples) == 2
    assert overlap(A, ["Why?"]).normalised == (0, 0)
    assert overlap(A, B, examples=0).examples == []


def test_overlap_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.jsonl", A), write(tmp_path / "b.jsonl", B)
    assert code("overlap", a, b) == 3
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["questions", "4", "3"] in lines
    assert ["distinct", "3", "3"] in lines
    assert ["in", "the", "other,", "exactly", "1", "1"] in lines
    assert ["in", "the", "other,", "normalised", "3", "2"] in lines
    assert ["B:", "(the", "same)"] in lines
    assert code("overlap", a, b, "--json", "--examples", "1") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["normalised"] == [3, 2]
    assert found["examples"] == [["How many?", "how many"]]
    assert code("overlap", a, write(tmp_path / "c.jsonl", ["Why?"])) == 0


def test_overlap_of_other_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.jsonl", A, "q"), write(tmp_path / "b.jsonl", B, "q")
    assert code("overlap", a, b) == 2
    assert "none of them question, problem" in capsys.readouterr().err
    assert code("overlap", a, b, "--column", "q") == 3
    assert code("overlap", a, b, "--column", "gold") == 2
    assert "lacks the column 'gold'; it has ['q', 'n']" in capsys.readouterr().err


def test_overlap_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    options = "{prompt_style: digits, train_examples: 30, test_examples: 5}"
    recipe.write_text(f"model: {{path: m}}\ntask: {{name: countdown, options: {options}}}\n")
    assert code("overlap", f"{recipe}:train", f"{recipe}:test") == 0
    assert code("overlap", f"{recipe}:test", f"{recipe}:test") == 3
    capsys.readouterr()
    assert code("overlap", str(recipe), f"{recipe}:test") == 2
    assert f"{recipe} is a task: name its split" in capsys.readouterr().err
    assert code("overlap", f"{recipe}:dev", f"{recipe}:test") == 2
    assert "splits train, validation, test, not 'dev'" in capsys.readouterr().err


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["train_examples=3", "test_examples=2", "validation_examples=1"]
    assert code("show", "countdown", *options, "--examples", "1", "--split", "test") == 0
    out = capsys.readouterr().out
    assert "task countdown: 3 train, 1 validation, 2 test" in out
    assert "reward expression: weight 1" in out
    assert "--- test example 0" in out and "example 1" not in out
    assert "[user]\nRespond in the following format:" in out
    assert "[columns] {'nums': [" in out
    assert "[target]\n<answer>\n" in out


def test_a_task_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_task(tmp_path, "words"))
    try:
        assert code("show", "words", "count=7", "--file", file) == 0
        assert "task words: 6 train, 0 validation, 1 test" in capsys.readouterr().out
        assert code("overlap", "words:train", "words:test", "--file", file) == 2
        assert "do not say what their question is" in capsys.readouterr().err
        assert code("show", "words", "--split", "validation") == 2
        assert "task words has no validation examples" in capsys.readouterr().err
    finally:
        files._LOADED.clear()
        unregister_task("words")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "countdwn"], "unknown task 'countdwn', did you mean 'countdown'?"),
        (["show", "countdown", "largst=3"], "no option 'largst', did you mean 'largest'?"),
        (["show", "countdown", "largest"], "expected dotted.path=value"),
        (["show", "countdown", "--examples", "-1"], "--examples must be >= 0, got -1"),
        (["overlap", "missing.jsonl", "b"], "there is no file or folder missing.jsonl"),
        (["overlap", "owner/name:train", "owner/name:test"], "offline mode is on"),
        (["show", "x", "--file", "missing.py"], "there is no task file missing.py"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(*arguments) == 2
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert code() == 0
    assert "overlap" in capsys.readouterr().out
    assert code("overlap", "--help") == 0
    assert "exit code: 0 no overlap, 3 some" in capsys.readouterr().out
