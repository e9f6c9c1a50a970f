"""Tasks from a user's file: registered, replaced when changed, and blamed by name and line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from egspo.rewards.scoring import score_completions
from egspo.tasks import build_task, files, load_task_file, registered_tasks
from egspo.tasks.base import unregister_task
from egspo.tasks.files import TaskFileError
from tests.helpers import runs

TASK = """\
from __future__ import annotations
from dataclasses import dataclass
from egspo.tasks import Example, Reward, Task, register_task

@dataclass
class Word:
    text: str

@register_task("NAME")
def build(count: int = 4) -> Task:
    prompts = [Example([{"role": "user", "content": "1" * (i + 1)}]) for i in range(count)]
    def share(completions, **columns):
        return [text.count("1") / 8 + VALUE for text in completions]
    return Task("NAME", prompts[1:], prompts[:1], [Reward("share", share)])
"""


def write(folder: Path, name: str, *, value: str = "0", file: str = "my_task.py") -> Path:
    path = folder / file
    path.write_text(TASK.replace("NAME", name).replace("VALUE", value))
    return path


@pytest.fixture(autouse=True)
def forget_tasks() -> Any:
    before = set(registered_tasks())
    yield
    files._LOADED.clear()
    for name in set(registered_tasks()) - before:
        unregister_task(name)


def reward(name: str) -> float:
    return build_task(name).rewards[0].function(completions=["11"])[0]


def test_a_file_registers_and_replaces_its_tasks(tmp_path: Path) -> None:
    path = write(tmp_path, "words")
    assert load_task_file(path) == load_task_file(str(path)) == ["words"]
    assert reward("words") == 0.25
    write(tmp_path, "words", value="1")
    assert load_task_file(path) == ["words"]
    assert reward("words") == 1.25
    write(tmp_path, "letters2")
    assert load_task_file(path) == ["letters2"]
    assert "words" not in registered_tasks()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\nraise KeyError('gold')", "my_task.py, line 2: KeyError: 'gold'"),
        ("def f(:\n  pass", "my_task.py, line 1: SyntaxError: "),
        ("import nothing_of_that_name", "line 1: ModuleNotFoundError: No module named"),
        ("import sys\nsys.exit(1)", "line 2: SystemExit: 1"),
        ("x = 1", "my_task.py registers no task: decorate a builder with @register_task"),
        (TASK.replace("NAME", "sudoku"), "line 9: ValueError: task 'sudoku' is registered alread"),
        (TASK.replace("NAME", "half") + "1 / 0", "line 15: ZeroDivisionError"),
        ("\0", "my_task.py"),
    ],
)
def test_files_that_fail(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "my_task.py"
    path.write_text(content)
    before = registered_tasks()
    with pytest.raises(TaskFileError, match=message):
        load_task_file(path)
    assert registered_tasks() == before


def test_missing_files(tmp_path: Path) -> None:
    write(tmp_path, "words")
    with pytest.raises(
        FileNotFoundError, match=r"there is no task file .*did you mean 'my_task.py"
    ):
        load_task_file(tmp_path / "my_tsk.py")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_task_file(tmp_path / "missing" / "my_task.py")


def train_config(output: Path, file: Path, **task: Any) -> Any:
    return runs.config(
        output, runs.LETTERS, {"task": {"name": "words", "file": str(file), **task}, "steps": 1}
    )


def test_a_recipe_names_the_file(tmp_path: Path) -> None:
    from egspo.config.recipe import load_config
    from egspo.files import CheckpointError
    from egspo.training.trainer import train

    file, run = write(tmp_path, "words"), tmp_path / "run"
    config = train_config(run, file)
    train(config)
    assert (run / "task.py").read_bytes() == file.read_bytes()
    assert load_config(run / "config.yaml") == config
    # The same content at another place is the same task; another content is not.
    moved = file.rename(tmp_path / "moved.py")
    config = train_config(run, moved)
    config.steps = 2
    train(config, resume=run)
    write(tmp_path, "words", value="1", file="moved.py")
    config.steps = 3
    with pytest.raises(CheckpointError, match=r"task.file=.*moved.py differs from the copy .*task"):
        train(config, resume=run)


def test_a_finished_run_of_a_sweep_is_of_the_same_file(tmp_path: Path) -> None:
    from egspo.config.convert import ConfigError
    from egspo.config.recipe import save_config
    from egspo.evaluations.sweep import _check_same

    config = train_config(tmp_path / "run", write(tmp_path, "words"))
    save_config(config, tmp_path / "run" / "config.yaml")
    _check_same(config, tmp_path / "run")
    write(tmp_path, "words", value="1")
    with pytest.raises(ConfigError, match="the finished run here has another configuration"):
        _check_same(config, tmp_path / "run")


def test_a_file_without_the_task_named(tmp_path: Path) -> None:
    from egspo.training.trainer import train

    file = write(tmp_path, "words2")
    with pytest.raises(ValueError, match="unknown task 'words', did you mean 'words2'"):
        train(train_config(tmp_path / "run", file))


@pytest.mark.parametrize("seconds", [0, -1.5])
def test_bad_reward_timeouts(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match=r"task\.reward_timeout must be > 0, or null"):
        train_config(tmp_path, tmp_path, reward_timeout=seconds)


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(# vowels\.py\n.*?)```", text, re.DOTALL)
    path = tmp_path / "vowels.py"
    path.write_text(block)
    assert load_task_file(path) == ["vowels"]
    task = build_task("vowels", words=50)
    assert (len(task.train), len(task.validation), len(task.test)) == (30, 10, 10)
    scored = score_completions(task.rewards, ["?", "?"], ["aeb", "x"], {})
    assert scored.total.tolist() == [2 / 3, 0]
