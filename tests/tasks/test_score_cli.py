"""``egspo data score``: the answer that is found in a completion, each reward and why."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from egspo.cli import main
from egspo.rewards.audit import audit, read_completions
from egspo.runs.lock import LOCK
from egspo.tasks import Task, build_task, files
from egspo.tasks.answers import in_format
from egspo.tasks.base import unregister_task
from tests.helpers.runs import hold_elsewhere
from tests.tasks.test_task_files import write as write_task

COUNTDOWN = ["train_examples=3", "test_examples=2", "validation_examples=1", "numbers=2"]


def countdown() -> Task:
    options = {name: int(value) for name, value in (o.split("=") for o in COUNTDOWN)}
    return build_task("countdown", **options)


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_every_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = countdown()
    example, other = task.train[1], task.test[0]
    prompt = other.prompt[0]["content"]
    source = write(
        tmp_path / "texts.jsonl",
        [
            {"row": 1, "completion": str(example.target)},
            {"row": 1, "completion": "<answer>1+1</answer>", "tokens": 7},
            {"row": 0, "split": "test", "completion": str(other.target)},
            {"prompt": prompt, "completion": str(other.target)},
            {"prompt": other.prompt, "split": "test", "completion": "no answer \ud800"},
        ],
    )
    output = tmp_path / "new" / "scores.jsonl"
    arguments = ["data", "score", "countdown", *COUNTDOWN]
    assert main([*arguments, "--completions", source, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    records = lines(output)
    assert [(r["split"], r["row"]) for r in records] == [
        *(("train", 1), ("train", 1), ("test", 0), ("test", 0), ("test", 0))
    ]
    assert [r["rewards"]["expression"] for r in records] == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert [r["reward"] for r in records] == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert [r["solved"] for r in records] == [True, False, True, True, False]
    assert records[1]["extracted"] == "1+1" and records[4]["extracted"] is None
    assert records[0]["why"] == {"expression": f"is {example.columns['target']}"}
    assert records[4]["why"]["expression"].startswith("no answer")
    for text in ("task countdown", "train 1", "test 0", "1+1", "expression", "each exactly once"):
        assert text in shown
    assert "5 completions, mean reward 0.600, 3 solved" in shown


def test_an_earlier_file_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "texts.jsonl", [{"row": 0, "completion": ""}])
    (tmp_path / "out.jsonl").write_text("earlier")
    arguments = ["data", "score", "countdown", *COUNTDOWN, "--completions", source]
    assert main([*arguments, "--output", str(tmp_path / "out.jsonl")]) == 0
    (old,) = tmp_path.glob("out.jsonl.old-*")
    assert old.read_text() == "earlier" and "the earlier file is kept" in capsys.readouterr().err
    assert len(lines(tmp_path / "out.jsonl")) == 1
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert "--output is a file" in capsys.readouterr().err
    hold_elsewhere(tmp_path / f"{LOCK}-out.jsonl")
    assert main([*arguments, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "is in use by process" in capsys.readouterr().err.replace("\n", " ")
    assert len(lines(tmp_path / "out.jsonl")) == 1


def test_standard_input_with_a_byte_order_mark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('\ufeff{"row": 0, "completion": "x"}\r\n\r\n'))
    assert main(["data", "score", "countdown", *COUNTDOWN, "--completions", "-"]) == 0
    assert "1 completions" in capsys.readouterr().out


def test_a_recipe_and_its_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    options = "{prompt_style: digits, train_examples: 3, test_examples: 2}"
    recipe.write_text(f"model: {{path: m}}\ntask: {{name: sudoku, options: {options}}}\n")
    example = build_task("sudoku", train_examples=3, test_examples=2).train[2]
    clues, solution = example.columns["puzzle"], example.columns["solution"]
    broken = "".join(
        "1234"[int(d) % 4] if i == next(k for k, c in enumerate(clues) if c != "0") else d
        for i, d in enumerate(solution)
    )
    source = write(tmp_path / "texts.jsonl", [{"row": 2, "completion": broken}])
    output = tmp_path / "out.jsonl"
    options_given = ["task.reward_weights={cell_accuracy: 2}", "--completions", source]
    for reward, pays in (("strict", 8 / 9), ("empty_cells", 1.0)):
        arguments = ["data", "score", str(recipe), f"task.options.reward={reward}", *options_given]
        assert main([*arguments, "--output", str(output)]) == 0
        (record,) = lines(output)
        assert record["extracted"] == broken and record["solved"] is False
        assert record["rewards"] == {"cell_accuracy": pytest.approx(pays)}
        assert record["reward"] == pytest.approx(2 * pays)
        output.unlink()
    assert "clues are not kept" in capsys.readouterr().out


def test_a_task_of_a_file_need_explain_nothing(tmp_path: Path) -> None:
    file, output = str(write_task(tmp_path, "words")), tmp_path / "out.jsonl"
    source = write(tmp_path / "texts.jsonl", [{"row": 0, "completion": "a"}])
    arguments = ["data", "score", "words", "--file", file, "--completions", source]
    try:
        assert main([*arguments, "--output", str(output)]) == 0
        (record,) = lines(output)
        assert record["extracted"] is record["solved"] is None and record["why"] == {}
        assert set(record["rewards"]) == {reward.name for reward in build_task("words").rewards}
    finally:
        files._LOADED.clear()
        unregister_task("words")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "expected an object with the text completion"),
        ('{"row": 0}', "expected an object with the text completion"),
        ('{"row": 0, "completion": 1}', "expected an object with the text completion"),
        ('{"completion": "x"}', "lacks row"),
        ('{"row": 3, "completion": "x"}', r"row must be a number in \[0, 2\] of train, got 3"),
        ('{"row": -1, "completion": "x"}', "row must be a number"),
        ('{"row": true, "completion": "x"}', "row must be a number"),
        ('{"row": "1", "completion": "x"}', "row must be a number"),
        ('{"row": 2, "split": "test", "completion": "x"}', r"in \[0, 1\] of test, got 2"),
        ('{"row": 0, "split": "dev", "completion": "x"}', "split must be one of train, valid"),
        ('{"prompt": "?", "completion": "x"}', r"no row has the prompt '\?' in any split"),
        ('{"prompt": "?", "row": 0, "completion": "x"}', "row 0 of train has another prompt"),
    ],
)
def test_lines_that_are_wrong_are_named(line: str, message: str) -> None:
    text = f'{{"row": 0, "completion": "x"}}\n{line}\n'
    with pytest.raises(ValueError, match=rf"^a\.jsonl, line 2: .*{message}"):
        read_completions(countdown(), text, "a.jsonl")


def test_prompts_that_are_not_unique_and_no_completions(tmp_path: Path) -> None:
    task = countdown()
    twice = Task("t", [task.train[0]] * 2, task.test, task.rewards)
    prompt = json.dumps(task.train[0].prompt[0]["content"])
    with pytest.raises(ValueError, match=r"2 rows have the prompt .* in the split train"):
        read_completions(twice, f'{{"prompt": {prompt}, "split": "train", "completion": ""}}', "a")
    with pytest.raises(ValueError, match=r"^a has no completions"):
        read_completions(task, "\n\n", "a")


def test_every_reward_of_the_tasks_says_why(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "3+4\n#### 7"}
    file = write(tmp_path / "a.jsonl", [row, {**row, "question": "Who?"}])
    options: dict[str, Any] = {"test": None, "test_examples": 1, "validation_examples": 0}
    task = build_task("gsm8k", train=file, **options)
    texts = [in_format("3+4", "7"), "<answer>8</answer> so", "7"]
    found = audit(
        task,
        read_completions(
            task, "\n".join(json.dumps({"row": 0, "completion": text}) for text in texts), "a"
        ),
    )
    for each in found:
        assert each.why.keys() == {reward.name for reward in task.rewards} == each.rewards.keys()
    right, wrong, none = found
    assert right.why["correctness"] == "'7' is 7, as it should"
    assert right.why["strict_format"] == "is the format"
    assert wrong.why["correctness"] == "'8' is 8, not 7"
    assert wrong.why["strict_format"] == "<reasoning> occurs 0 times, not once"
    assert wrong.why["soft_format"] == "does not begin with <reasoning>"
    assert none.why["correctness"] == none.why["integer"] == "no answer in closed tags or a box"
    assert none.why["xml_count"].startswith("0 of 4 tags")
