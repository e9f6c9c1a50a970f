"""``egspo eval``: what it measures, what it writes, and what survives a kill."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from egspo.cli import main
from egspo.evaluations import best_checkpoint, bootstrap, run, wilson
from egspo.evaluations.checkpoints import choose_checkpoint
from egspo.evaluations.intervals import interval_of
from egspo.evaluations.records import SampleFile
from egspo.files import PARTIAL, CheckpointError
from egspo.models import new_model
from egspo.runs.lock import LOCK
from egspo.runs.metrics import read_metrics
from egspo.tasks.sudoku_answers import GridRewards, grid_in
from egspo.training.trainer import train
from tests.helpers import runs
from tests.helpers.chatml import EOS, MASK, write_tokenizer

TASK_FILE = """
from egspo.tasks import Example, Reward, Task, register_task

@register_task("digits")
def digits(count: int = 4, broken: str = "") -> Task:
    def share(completions, place, **_):
        if broken == "reward" and 2 in place:
            raise RuntimeError("no share of number two")
        return [text.count("1") / 8 for text in completions]

    def has_one(completions, place, **_):
        if broken == "metric" and 2 in place:
            raise RuntimeError("no answer to number two")
        return [float("1" in text) for text in completions]

    examples = [
        Example([{"role": "user", "content": str(i % 5)}], {"place": i}) for i in range(count)
    ]
    return Task(
        "digits", examples, examples, [Reward("share", share)],
        solved=None if broken == "reward" else has_one,
        extract=lambda text: text[:1] or None,
    )
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that evaluated and kept a checkpoint at the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
        train(runs.config(folder))
    return folder


@pytest.fixture
def task_file(tmp_path: Path) -> str:
    file = tmp_path / "my_tasks.py"
    file.write_text(TASK_FILE)
    return str(file)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences every rollout was asked for."""
    counts: list[int] = []
    original = run.rollout_blocks

    def counting(denoiser: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(prompts))
        return original(denoiser, prompts, *args, **kwargs)

    monkeypatch.setattr(run, "rollout_blocks", counting)
    return counts


def evaluate(model: Path, output: Path, *arguments: str) -> dict[str, Any]:
    """The summary of ``egspo eval``."""
    assert main(["eval", str(model), "--output-dir", str(output), *arguments]) == 0
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def samples(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples" / name).read_text().splitlines()]


def test_a_run_is_measured_on_its_own_task_as_in_training(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(trained)]) == 0
    output = trained / "eval" / "final"
    (row,) = json.loads((output / "summary.json").read_text())["results"]
    assert (row["task"], row["max_new_tokens"], row["steps"]) == ("sudoku", 20, 5)
    assert (row["prompts"], row["samples"], row["metric"]) == (5, 5, "solved")
    last = read_metrics(trained)[-1]
    assert row["rewards"]["reward"] == pytest.approx(last["eval/reward"], abs=1e-12)
    assert row["score"] == last["eval/solved"]
    assert row["interval"] == wilson(round(5 * row["score"]), 5)._asdict()

    shown, table = capsys.readouterr().out, (output / "summary.md").read_text()
    assert "sudoku" in shown and "Wilson" in shown and str(output / "summary.md") in shown
    assert table.splitlines()[2].startswith("| Task | Length | Prompts | Score | 95 % |")
    assert f"| sudoku | 20 | 5 | {100 * row['score']:.1f} % |" in table
    shutil.rmtree(trained / "eval")


def test_samples_say_what_was_asked_answered_and_paid(trained: Path, tmp_path: Path) -> None:
    evaluate(trained, tmp_path, "--lengths", "20,40", "--limit", "3")
    for length, steps in ((20, 5), (40, 10)):  # as many tokens per step
        records = samples(tmp_path, f"sudoku-{length}.jsonl")
        assert [(r["index"], r["sample"]) for r in records] == [(0, 0), (1, 0), (2, 0)]
        for record in records:
            assert set(record) == {
                *("index", "sample", "prompt", "completion", "answer", "score", "rewards"),
                *("steps", "tokens", "finish_reason"),
            }
            assert record["rewards"].keys() == {"reward", "cell_accuracy"}
            assert record["steps"] <= steps and record["tokens"] <= length
            assert record["finish_reason"] == ("eos" if record["tokens"] < length else "length")
    from egspo.cli.evaluate import _config_of
    from egspo.evaluations.plan import load_task

    examples = load_task(_config_of(trained).task).test
    for record in samples(tmp_path, "sudoku-20.jsonl"):
        example = examples[record["index"]]
        assert record["prompt"] == example.prompt
        columns = {name: [value] for name, value in example.columns.items()}
        rewards = GridRewards(grid_in, "strict")
        scores = rewards.cell_accuracy([record["completion"]], **columns)
        assert [record["rewards"]["cell_accuracy"]] == scores


@pytest.mark.slow
def test_killed_and_continued_is_the_same_and_decodes_nothing_twice(
    trained: Path, tmp_path: Path, decoded: list[int]
) -> None:
    options = ["--lengths", "20,40", "--batch-size", "1", "--temperature", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = evaluate(trained, whole, *options)
    arguments = ["eval", str(trained), "--output-dir", str(broken), *options]
    process = runs.forkserver().Process(target=runs.evaluate_and_die, args=(arguments, 8))
    process.start()
    process.join(60)
    assert process.exitcode == -runs.SIGKILL
    parts = sorted((broken / "samples").glob("*.part-0.jsonl"))
    assert [part.name for part in parts] == ["sudoku-20.part-0.jsonl", "sudoku-40.part-0.jsonl"]
    with parts[1].open("a") as stream:
        stream.write('{"index": 4, "sam')  # as a kill in the middle of a write leaves it

    del decoded[:]
    assert evaluate(trained, broken, *options) == expected
    assert decoded == [3]  # 7 of 10 were there
    for name in ("sudoku-20.jsonl", "sudoku-40.jsonl"):
        assert samples(broken, name) == samples(whole, name)
    assert not list((broken / "samples").glob("*.part-*"))


@pytest.mark.slow
def test_two_processes_do_what_one_does(trained: Path, tmp_path: Path) -> None:
    options = ["--lengths", "20,40", "--temperature", "1", "--samples", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["eval", str(trained), "--output-dir", str(tmp_path / "two"), *options]
    processes = [
        runs.forkserver().Process(target=runs.evaluate_as_rank, args=(arguments, rank, 2, port))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    one = evaluate(trained, tmp_path / "one", *options)
    assert json.loads((tmp_path / "two" / "summary.json").read_text()) == one
    for name in ("sudoku-20.jsonl", "sudoku-40.jsonl"):
        assert samples(tmp_path / "two", name) == samples(tmp_path / "one", name)


@pytest.mark.slow
@pytest.mark.parametrize("blow_of", [runs.SIGKILL, runs.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_process_ends_the_other(blow_of: int, trained: Path, tmp_path: Path) -> None:
    """With exit code 4, and the same command goes on."""
    arguments = ["eval", str(trained), "--output-dir", str(tmp_path / "two"), "--batch-size", "1"]
    arguments += ["--timeout", "8"]
    blow = runs.Strike(1, "egspo.evaluations.records.SampleFile.append", 2, blow_of)
    log, port = tmp_path / "log", runs.free_port()
    processes = [
        runs.forkserver().Process(
            target=runs.command_as_rank, args=(arguments, rank, 2, port, log, blow)
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    processes[0].join(60)
    for process in processes:
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [4, -runs.SIGKILL], log.read_text()
    assert "Traceback" not in log.read_text()
    assert main(arguments) == 0
    assert len(samples(tmp_path / "two", "sudoku-20.jsonl")) == 5
    assert not list((tmp_path / "two").rglob("*part*"))


def test_another_evaluation_is_refused_with_what_differs(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(trained, tmp_path / "out", "--limit", "2")
    again = ["eval", str(trained), "--output-dir", str(tmp_path / "out")]
    for changes, named in (
        (["--temperature", "1"], "decoding.temperature was 0.0, now 1.0"),
        (["--steps", "10"], "steps.20 was 5, now 10"),
        (["--seed", "1"], "seed was 0, now 1"),
        (["--checkpoint", "2"], "weights.model was "),
        (["--task-option", "sudoku.seed=3"], "tasks.sudoku.options.seed was None, now 3"),
    ):
        capsys.readouterr()
        assert main([*again, *changes]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'out'} has the samples of another evaluation" in error
        assert named in error and "--overwrite" in error
    assert len(samples(tmp_path / "out", "sudoku-20.jsonl")) == 2
    assert main([*again, "--seed", "1", "--overwrite"]) == 0
    (kept,) = tmp_path.glob("out.old-*")
    assert len(samples(kept, "sudoku-20.jsonl")) == 2


def test_more_of_everything_may_be_added_later(
    trained: Path, tmp_path: Path, task_file: str, decoded: list[int]
) -> None:
    options = ["--temperature", "1"]
    evaluate(trained, tmp_path / "out", *options, "--limit", "2")
    evaluate(trained, tmp_path / "out", *options, "--limit", "3", "--samples", "2")
    more = ["--task-file", task_file, "--tasks", "sudoku,digits", "--lengths", "20,40"]
    summary = evaluate(trained, tmp_path / "out", *options, *more, "--batch-size", "2")
    assert decoded == [2, 4, 2, 5, 4, 4]
    assert [r["samples"] for r in summary["results"]] == [5, 5, 4, 4]  # one per prompt again


def test_several_samples_per_prompt(
    trained: Path, tmp_path: Path, task_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks", "digits", "--task-file", task_file, "--samples", "3"]
    assert main(["eval", str(trained), *options, "--output-dir", str(tmp_path)]) == 2
    assert "samples=3 needs a temperature above 0" in capsys.readouterr().err
    (row,) = evaluate(trained, tmp_path, *options, "--temperature", "1.5")["results"]
    records = samples(tmp_path, "digits-20.jsonl")
    assert (row["prompts"], row["samples"]) == (4, 12) and len(records) == 12
    for place in range(4):
        texts = {r["sample"]: r["completion"] for r in records if r["index"] == place}
        assert len(set(texts.values())) > 1
    by_prompt = [[r["score"] for r in records if r["index"] == i] for i in range(4)]
    assert row["score"] == pytest.approx(sum(map(sum, by_prompt)) / 12)
    assert row["interval"] == bootstrap([sum(scores) / 3 for scores in by_prompt])._asdict()
    table = (tmp_path / "summary.md").read_text()
    assert "| 4 x 3 |" in table and "bootstrap over prompts" in table


def test_tasks_from_a_file_and_their_options(trained: Path, tmp_path: Path, task_file: str) -> None:
    options = ["--task-file", task_file, "--tasks", "digits", "--task-option", "digits.count=7"]
    (row,) = evaluate(trained, tmp_path / "out", *options)["results"]
    assert (row["task"], row["prompts"], row["metric"]) == ("digits", 7, "solved")
    for record in samples(tmp_path / "out", "digits-20.jsonl"):
        assert record["answer"] == (record["completion"][:1] or None)
        assert record["score"] == float("1" in record["completion"])


@pytest.mark.slow
def test_built_in_tasks_at_two_lengths_on_a_model_from_a_folder(tmp_path: Path) -> None:
    """Prompts of real length; a task with data in files, and one with a validation split."""
    folder, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    vocab = {"vocab_size": 264, "embedding_size": 264}
    tokens = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS}
    sizes = {**runs.MODEL, "max_sequence_length": 2048}
    new_model({**sizes, **vocab, **tokens}, seed=0).save_pretrained(folder)
    write_tokenizer(folder)
    questions = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions))
    options = [
        *("--tasks", "gsm8k,countdown", "--lengths", "8,16", "--block-length", "8", "--limit", "3"),
        *("--task-option", f"gsm8k.train={rows}", "--task-option", "gsm8k.test=null"),
        *("--task-option", "gsm8k.test_examples=3", "--task-option", "gsm8k.validation_examples=2"),
        *("--task-option", "countdown.train_examples=2"),
    ]
    table = evaluate(folder, tmp_path / "test", *options)["results"]
    assert [(row["task"], row["max_new_tokens"], row["steps"]) for row in table] == [
        *(("gsm8k", 8, 4), ("gsm8k", 16, 8)),
        *(("countdown", 8, 4), ("countdown", 16, 8)),
    ]
    assert {row["metric"] for row in table} == {"solved"}
    assert table[0]["rewards"].keys() == {
        *("reward", "correctness", "integer", "strict_format", "soft_format", "xml_count")
    }
    (row, *_) = evaluate(folder, tmp_path / "held_out", *options, "--split", "validation")[
        "results"
    ]
    assert row["prompts"] == 2
    asked = [
        {record["prompt"][0]["content"] for record in samples(tmp_path / name, "gsm8k-8.jsonl")}
        for name in ("test", "held_out")
    ]
    assert len(asked[0]) == 3 and not asked[0] & asked[1]


def test_a_reward_that_fails_is_left_out_and_said(
    trained: Path, tmp_path: Path, task_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task-file", task_file, "--tasks", "digits", "--batch-size", "1"]
    broken = [*options, "--task-option", "digits.broken=reward"]
    (row,) = evaluate(trained, tmp_path / "out", *broken)["results"]
    assert (row["samples"], row["unscored"], row["metric"]) == (4, 1, "reward")
    records = samples(tmp_path / "out", "digits-20.jsonl")
    assert [r["score"] is None for r in records] == [False, False, True, False]
    assert "no share of number two" in records[2]["errors"][0]
    assert row["score"] == pytest.approx(sum(r["score"] for r in records if r["index"] != 2) / 3)
    assert "1 of 4 completions are left out" in " ".join(capsys.readouterr().out.split())


def test_a_metric_that_fails_ends_the_evaluation_and_keeps_the_rest(
    trained: Path, tmp_path: Path, task_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task-file", task_file, "--tasks", "digits", "--batch-size", "1"]
    broken = [*options, "--task-option", "digits.broken=metric"]
    assert main(["eval", str(trained), "--output-dir", str(tmp_path / "out"), *broken]) == 2
    assert "'solved' raised RuntimeError: no answer to number two" in capsys.readouterr().err
    file = SampleFile(tmp_path / "out" / "samples", "digits-20")
    file.join()
    assert {0, 1} <= {record["index"] for record in file.read()} <= {0, 1, 3}


def test_adapters(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = {
        "steps": 2,
        "model": {
            "path": str(trained / "final" / "model"),
            "config": None,
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
        train(runs.config(tmp_path / "lora", lora))
    adapter = ["--adapter", str(tmp_path / "lora")]
    output = tmp_path / "lora" / "eval" / "step-000002"
    assert main(["eval", str(trained), *adapter, "--checkpoint", "last"]) == 0
    (row,) = json.loads((output / "summary.json").read_text())["results"]
    last = read_metrics(tmp_path / "lora")[-1]
    assert row["rewards"]["reward"] == pytest.approx(last["eval/reward"], abs=1e-12)
    assert main(["eval", str(tmp_path / "lora")]) == 2
    hint = f"did you mean egspo eval BASE --adapter {tmp_path / 'lora'}?"
    assert hint in capsys.readouterr().err


def test_the_best_checkpoint_is_the_one_with_the_best_held_out_reward(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    for rewards, step in (({2: 0.3, 4: 0.2}, 2), ({2: 0.3, 4: 0.4}, 4), ({2: 0.3, 4: 0.3}, 2)):
        lines = [json.dumps({"step": s, "eval/reward": r}) for s, r in {0: 0.1, **rewards}.items()]
        (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        assert best_checkpoint(copy).name == f"step-{step:06d}"
    assert main(["eval", str(copy), "--checkpoint", "best"]) == 0
    output = copy / "eval" / "step-000002"
    assert json.loads((output / "summary.json").read_text())["model"].endswith("step-000002/model")
    # The Sudoku task has no validation split: the choice saw the prompts of the score.
    assert "was chosen on these prompts" in " ".join(capsys.readouterr().out.split())
    assert "was chosen on these prompts" in (output / "summary.md").read_text()


def test_checkpoints_that_cannot_be_chosen(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    assert choose_checkpoint(copy, "last").name == "step-000004"
    assert choose_checkpoint(copy, "2").name == "step-000002"
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3, but \[2, 4\]"):
        choose_checkpoint(copy, "3")
    with pytest.raises(ValueError, match="best, last or a step, got 'newest'"):
        choose_checkpoint(copy, "newest")
    (copy / "metrics.jsonl").write_text('{"step": 3, "eval/reward": 0.5}\n')
    with pytest.raises(CheckpointError, match=r"\[2, 4\] and evaluated at \[3\].*keep_best"):
        choose_checkpoint(copy, "best")
    weights = next((copy / "checkpoints" / "step-000004").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        choose_checkpoint(copy, "last")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint to choose"):
        choose_checkpoint(copy, "best")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tasks", "sudoko"], "unknown task 'sudoko', did you mean 'sudoku'?"),
        (["--tasks", "sudoku,sudoku"], "task sudoku is named twice"),
        (["--task-option", "gsm8k.seed=1"], "none of the tasks ['sudoku']"),
        (["--task-option", "sudoku=1"], "expected TASK.KEY=VALUE"),
        (["--task-option", "seed"], "expected dotted.path=value"),
        (["--task-option", "sudoku.sed=1"], "task sudoku has no option 'sed'"),
        (["--split", "validation"], "task sudoku has no validation split"),
        (
            ["--lengths", "30", "--steps", "5"],
            "generation.max_new_tokens (30) must be a multiple of",
        ),
        (["--lengths", "30", "--block-length", "3"], "steps are no whole number: give --steps"),
        (["--lengths", "80"], "task sudoku: prompt 0 has 18 tokens"),
        (["--limit", "0"], "limit must be >= 1, got 0"),
        (["--checkpoint", "7"], "no checkpoint of step 7"),
    ],
)
def test_errors_before_any_work(
    arguments: list[str],
    problem: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["eval", str(trained), "--output-dir", str(tmp_path / "out"), *arguments]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_run_needs_tasks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "final" / "model", tmp_path / "model")
    assert main(["eval", str(tmp_path / "model")]) == 2
    assert "give --tasks" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "model"), "--checkpoint", "best"]) == 2
    assert "--checkpoint chooses from a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "model"), "--lengths", "128,x"])
    assert "expected numbers such as 128,256, got '128,x'" in capsys.readouterr().err


def test_damaged_samples_are_refused(tmp_path: Path) -> None:
    file = SampleFile(tmp_path, "task-8")
    rest = {"sample": 0, "rewards": {}, "tokens": 2, "steps": 1, "finish_reason": "stop"}
    file.append(0, [{"index": 1, "score": 1.0, **rest}])
    file.append(1, [{"index": 0, "score": 0.0, **rest}])
    file.join()
    assert [record["index"] for record in file.read()] == [0, 1]
    file.append(0, [{"index": 0, "score": 0.5, **rest}])  # joined, but killed before unlink
    file.join()
    assert [record["score"] for record in file.read()] == [0.5, 1.0]
    with file.path.open("a") as stream:
        stream.write("not json\n")
    with pytest.raises(ValueError, match=r"task-8.jsonl, line 3 is no sample.*'not json'"):
        file.read()
    good = {"index": 0, "score": None, **rest}
    for name, values in {
        **dict.fromkeys(("index", "sample", "tokens", "steps"), (-1, 1.5, True, None, "x", [])),
        "score": ("x", [], math.nan, math.inf),
        "rewards": (None, [], {"a": "b"}, {"a": math.inf}),
        "finish_reason": (None, 3),
    }.items():
        for value in values:
            lines = [json.dumps(record) + "\n" for record in (good, {**good, name: value})]
            file.path.write_text("".join(lines))
            with pytest.raises(ValueError, match="line 2 is no sample of an evaluation"):
                file.read()


def test_overwrite_renames_evaluations_only(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for path in (mine, mine / "thesis.txt"):
        assert main(["eval", str(trained), "--output-dir", str(path), "--overwrite"]) == 2
        assert "is no evaluation" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    with pytest.raises(SystemExit):
        main(["eval", str(trained), "--output-dir", ""])
    assert "--output-dir: it must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [None, "[]", "{}", '{"identity": []}', '{"identity": {"tasks": 3}}', "[" * 10**5, "x"],
)
def test_samples_of_an_unknown_evaluation_are_not_taken(
    content: str | None, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "sudoku-20.jsonl").write_text("mine")
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    assert main(["eval", str(trained), "--output-dir", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "evaluation" in said and "--overwrite" in said
    assert (tmp_path / "samples" / "sudoku-20.jsonl").read_text() == "mine"


def test_wilson() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        interval = wilson(successes, trials)
        assert interval.low == pytest.approx(low, abs=5e-5)
        assert interval.high == pytest.approx(high, abs=5e-5)
    with pytest.raises(ValueError, match="got 3 and 2"):
        wilson(3, 2)


def test_wilson_covers_the_truth_95_times_in_100() -> None:
    """Over all proportions, from the exact binomial probabilities of 30 trials."""
    trials, coverages = 30, []
    for percent in range(1, 100):
        p = percent / 100
        coverages.append(
            sum(
                math.comb(trials, k) * p**k * (1 - p) ** (trials - k)
                for k in range(trials + 1)
                if wilson(k, trials).low <= p <= wilson(k, trials).high
            )
        )
    assert sum(coverages) / len(coverages) == pytest.approx(0.95, abs=0.01)


def test_bootstrap() -> None:
    values = [(i * 37 % 101) / 100 for i in range(400)]
    mean = sum(values) / 400
    error = math.sqrt(sum((v - mean) ** 2 for v in values)) / 400
    interval = bootstrap(values)
    assert interval == bootstrap(values)
    assert interval.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    with pytest.raises(ValueError, match="at least two"):
        bootstrap([1.0])


def test_which_interval() -> None:
    # Samples of one prompt that agree tell nothing more than one would.
    for count in (1, 20):
        prompts = [[1.0] * count, [0.0] * count, [1.0] * count]
        assert interval_of(prompts, proportion=True) == wilson(2, 3)
    assert interval_of([[0.0, 0.0]] * 4, proportion=True) == wilson(0, 4)  # not [0, 0]
    assert interval_of([[1.0, 0.0], [0.0, 0.0]], proportion=True) == bootstrap([0.5, 0.0])
    assert interval_of([[1.0], [0.0]], proportion=False) == bootstrap([1.0, 0.0])
    assert interval_of([[0.25], [0.25]], proportion=False) is None


def test_one_evaluation_at_a_time_writes_to_a_folder(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two would join and delete each other's parts."""
    output = tmp_path / "eval"
    evaluate(trained, output, "--limit", "1")
    before = samples(output, "sudoku-20.jsonl")
    leftover = output / "samples" / f"{PARTIAL}x-1"
    leftover.write_text("of a kill")
    runs.hold_elsewhere(output / LOCK)
    for more in ([], ["--overwrite"]):
        arguments = ["eval", str(trained), "--output-dir", str(output), "--limit", "2", *more]
        assert main(arguments) == 2
        said = f"--output-dir {output} is in use by process {os.getppid()} on here since then"
        assert said in capsys.readouterr().err.replace("\n", " ")
        assert samples(output, "sudoku-20.jsonl") == before and leftover.exists()
    (output / LOCK).unlink()
    evaluate(trained, output, "--limit", "2")
    assert len(samples(output, "sudoku-20.jsonl")) == 2
    assert not list(output.rglob(".*"))
