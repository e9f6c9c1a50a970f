from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from egspo import __version__
from egspo.cli import main
from egspo.config import GenerationConfig, TrainConfig
from egspo.files import CheckpointError
from egspo.rollouts.completion import Completion
from egspo.runs.folder import MARK
from egspo.runs.metrics import MetricsWriter


class Calls(list[tuple[TrainConfig, Path | None]]):
    """Stands in for training: records the calls, and leaves what a run leaves."""

    error: BaseException | None = None

    def __call__(self, config: TrainConfig, *, resume: Path | None = None) -> Path:
        self.append((config, resume))
        if self.error is not None:
            raise self.error
        output = Path(config.output_dir)
        writer = MetricsWriter(output / "metrics.jsonl", resume_after=9 if resume else None)
        writer.write({"step": 0, "eval/reward": 0.25, "time/eval": 1.0})
        writer.write({"step": 1, "eval/reward": 0.5, "time/eval": 1.0, "time/step": 37.0})
        (output / "checkpoints" / "step-000001").mkdir(parents=True, exist_ok=True)
        (output / MARK).touch()
        (output / "final").mkdir(exist_ok=True)
        return output / "final"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    recorded = Calls()
    monkeypatch.setitem(sys.modules, "egspo.training.trainer", SimpleNamespace(train=recorded))
    monkeypatch.setitem(sys.modules, "egspo.training.warm_start", SimpleNamespace(run_sft=recorded))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("EGSPO_DEBUG", raising=False)
    return recorded


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{path: some/model}}\noutput_dir: {tmp_path / 'run'}\n")
    return str(path)


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom egspo.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    heavy = {'torch', 'transformers', 'matplotlib', 'rich', 'yaml'}\n"
        "    print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert output.endswith("loaded: []\n")
    for name in ("train", "sft", "plan", "generate", "export", "inspect", "doctor", "plot"):
        assert f"\n    {name} " in output
    assert "\n  egspo train recipes/sudoku_tiny.yaml --resume\n" in output  # layout is kept


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"egspo {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=1", "steps=7", "--output-dir", "{run}", "--seed", "2"],
        ["--seed", "2", "--output-dir", "{run}", "seed=1", "steps=7"],
        ["seed=1", "--seed", "2", "steps=7", "--output-dir", "{run}"],
    ],
)
def test_overrides_may_stand_anywhere(
    recipe: str, tmp_path: Path, calls: Calls, arguments: list[str]
) -> None:
    run = tmp_path / "1.5: a 'run'"
    assert main(["train", recipe, *(text.format(run=run) for text in arguments)]) == 0
    ((config, resume),) = calls
    assert (config.seed, config.steps, config.output_dir, resume) == (2, 7, str(run), None)


def test_training_reports_what_it_achieved(
    recipe: str, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe]) == 0
    run = tmp_path / "run"
    assert capsys.readouterr().out.splitlines() == [
        "held-out reward: 0.250 -> 0.500",
        f"best held-out reward: 0.500 at step 1 ({run / 'final'})",
        "curve: 2 evaluations do not tell whether the held-out reward still rises",
        "more: training for 1 further step(s) would take about 0:37, at the measured 37 s a step "
        "(--resume steps=2)",
        f"model: {run / 'final'}",
        f"curves: {run / 'curves.png'}",
    ]
    assert len(calls) == 1


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_second_run_is_refused_with_the_ways_out(
    command: str, recipe: str, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, recipe]) == 0
    assert main([command, recipe]) == 2
    error = capsys.readouterr().err
    assert f"egspo: error: {tmp_path / 'run'} already has a finished run" in error
    for way_out in ("--resume steps=N ", "--overwrite ", "--output-dir DIR "):
        assert f"\n  {way_out}" in error
    assert len(calls) == 1

    (tmp_path / "run" / "final").rmdir()
    assert main([command, recipe]) == 2
    error = capsys.readouterr().err
    assert "unfinished run" in error
    assert "\n  --resume   continue it\n" in error
    (tmp_path / "run" / "checkpoints" / "step-000001").rmdir()
    assert main([command, recipe]) == 2
    error = capsys.readouterr().err
    assert "\n  --resume auto   begin again: it has no checkpoint yet\n" in error
    assert "continue it" not in error
    assert main([command, recipe, "--resume", "auto"]) == 0
    assert calls[-1][1] == "auto"


def test_other_processes_leave_the_output_to_the_first(
    recipe: str, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe]) == 0
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    assert main(["train", recipe]) == 0
    assert len(calls) == 2
    assert capsys.readouterr().out == ""


def test_resume(recipe: str, tmp_path: Path, calls: Calls) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(["train", recipe]) == 0
    checkpoint = run / "checkpoints" / "step-000001"
    assert main(["train", recipe, "--resume"]) == 0
    assert main(["train", recipe, "--resume", str(checkpoint)]) == 0
    assert main(["train", recipe, "--resume", "steps=3"]) == 0
    assert main(["train", recipe, "--resume", str(run), "--output-dir", str(other)]) == 0
    assert [resume for _, resume in calls] == [None, run, checkpoint, run, run]
    assert calls[3][0].steps == 3


def test_resuming_one_run_into_another_is_refused(
    recipe: str, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(tmp_path / "other")
    assert main(["train", recipe]) == main(["train", recipe, "--output-dir", other]) == 0
    assert main(["train", recipe, "--resume", other]) == 2
    assert main(["train", recipe, "--resume", "--overwrite"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert len(calls) == 2


def test_overwriting_loses_nothing(
    recipe: str, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe]) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main(["train", recipe, "--overwrite"]) == 0
    (kept,) = tmp_path.glob("run.old-*")
    assert (kept / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "notes.txt").exists()
    assert f"the earlier run is kept in {kept}" in capsys.readouterr().err
    assert calls[1][1] is None


@pytest.mark.parametrize(
    ("error", "code", "traceback"),
    [
        (ValueError("some input"), 2, False),
        (FileNotFoundError("some input"), 2, False),
        (CheckpointError("some input"), 2, False),
        (RuntimeError("some input"), 1, True),
        (KeyboardInterrupt(), 130, False),
    ],
)
def test_errors(
    recipe: str,
    calls: Calls,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    traceback: bool,
) -> None:
    calls.error = error
    assert main(["train", recipe]) == code
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) == traceback
    if code == 2:
        assert shown == "egspo: error: some input\n"
        assert main(["train", recipe, "--debug"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_debug_by_environment(
    recipe: str,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls.error = ValueError("some input")
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("EGSPO_DEBUG", value)
        assert main(["train", recipe]) == 2
        assert ("Traceback" in capsys.readouterr().err) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "RECIPE"),
        (["train", "r.yaml", "word"], "unrecognized argument: word"),
        (["train", "r.yaml", "--fast=1"], "unrecognized argument: --fast=1"),
        (["doctor", "a=1"], "unrecognized arguments: a=1"),
        (["generate", "--model", "m", "--policy", "best"], "invalid choice: 'best'"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bad_recipe_stops_before_anything_is_made(
    recipe: str, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe, "sed=1", "steps=x"]) == 2
    error = capsys.readouterr().err
    assert f"egspo: error: {recipe}: 2 problems\n  - " in error
    assert "sed: unknown key; did you mean seed?" in error
    assert main(["train", str(tmp_path / "recip.yaml")]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert not calls
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


class Generated(list[dict[str, Any]]):
    """Stands in for models and generation: answers with the prompt in capitals."""

    GENERATION_FILE = "egspo_generation.json"

    def load_model(self, path: str) -> Any:
        self.append({"model": path})
        return self

    def load_tokenizer(self, path: str, config: Any) -> str:
        assert config is self.config
        self[-1]["tokenizer"] = path
        return path

    def load_adapter(self, model: Any, path: str) -> Any:
        self[-1]["adapter"] = path
        return model

    config = object()

    def to(self, device: str) -> Any:
        return self

    def eval(self) -> Any:
        return self

    def stream(
        self,
        model: Any,
        tokenizer: str,
        prompts: Any,
        config: GenerationConfig,
        *,
        seed: int,
        skip: set[int],
        step_map: bool,
    ) -> Iterator[Completion]:
        assert model is self and tokenizer == self[-1]["tokenizer"]
        self[-1].update(config=config, seed=seed)
        assert not skip and not step_map
        for index, (message,) in reversed(list(enumerate(prompts))):
            assert message["role"] == "user"
            yield Completion(index, message["content"].upper(), [], "eos")


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Generated:
    fake = Generated()
    monkeypatch.setitem(sys.modules, "egspo.serving.generation", fake)
    monkeypatch.setitem(sys.modules, "egspo.models", fake)
    return fake


def test_generate_answers_prompts_from_everywhere(
    generated: Generated,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", "--model", "hub/name", "--prompt", "hello"]) == 0
    assert capsys.readouterr().out == "HELLO\n"
    assert generated[-1] == {
        **{"model": "hub/name", "tokenizer": "hub/name"},
        **{"config": GenerationConfig(), "seed": 0},
    }
    # As Windows writes it: with a byte order mark, and two characters at the end of a line.
    (tmp_path / "prompts.txt").write_bytes("\ufeffb\r\n\r\nc d\r\n".encode())
    output = tmp_path / "out" / "answers.txt"
    files = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(output)]
    assert main(["generate", "--model", "hub/name", "--prompt", "a", *files]) == 0
    assert output.read_text() == "### a\nA\n\n### b\nB\n\n### c d\nC D\n"
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    assert main(["generate", "--model", "hub/name", "--prompts", "-", "--seed", "4"]) == 0
    assert capsys.readouterr().out == "X\n"
    assert generated[-1]["seed"] == 4


def test_generation_options_come_from_the_checkpoint_then_the_command_line(
    generated: Generated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "final" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    stored: dict[str, Any] = {
        "max_new_tokens": 20,
        "steps": 10,
        "block_length": 20,
        "policy": "margin",
    }
    (folder / "egspo_generation.json").write_text(json.dumps(stored))
    for where in (tmp_path, tmp_path / "final", folder):
        options = ["--temperature", "0", "--steps", "5", "--batch-size", "3"]
        assert main(["generate", "--model", str(where), "--prompt", "a", *options]) == 0
        expected = GenerationConfig(
            **{**stored, "steps": 5},
            temperature=0.0,
            batch_size=3,
        )
        assert generated[-1]["config"] == expected
        assert generated[-1]["model"] == generated[-1]["tokenizer"] == str(folder)
    capsys.readouterr()
    assert main(["generate", "--model", str(folder), "--prompt", "a", "--steps", "21"]) == 2
    assert "generation.steps (21)" in capsys.readouterr().err


def test_generate_with_an_adapter(
    generated: Generated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path)
    adapter = tmp_path / "final" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "egspo_generation.json").write_text('{"batch_size": 5}')
    arguments = ["generate", "--prompt", "a", "--model"]
    assert main([*arguments, "hub/name", "--adapter", run]) == 0
    assert generated[-1] == {
        **{"model": "hub/name", "tokenizer": "hub/name", "adapter": str(adapter)},
        **{"config": GenerationConfig(batch_size=5), "seed": 0},
    }
    (adapter / "tokenizer_config.json").write_text("{}")
    assert main([*arguments, "hub/name", "--adapter", run]) == 0
    assert generated[-1]["tokenizer"] == str(adapter)
    assert main([*arguments, run]) == 2
    assert f"did you mean --model BASE --adapter {run}?" in capsys.readouterr().err


def test_generate_without_prompts(
    generated: Generated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", "hub/name"]) == 2
    assert "no prompts" in capsys.readouterr().err
    assert main(["generate", "--model", "m", "--prompts", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert not generated


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["egspo"] == __version__
    assert main(["doctor"]) == 0
    assert "select_steps" in capsys.readouterr().out


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        MetricsWriter(tmp_path / name / "metrics.jsonl").write({"step": 0, "eval/reward": 0.5})
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    expected = [tmp_path / name / "curves.png" for name in ("a", "b")]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in expected]
    assert all(path.is_file() for path in expected)
    assert main(["plot", str(tmp_path / "none")]) == 2
    assert "output_dir of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_closed_pipe_is_no_error() -> None:
    program = f"{sys.executable} -m egspo.cli doctor --json | head -c 1"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program}"], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "{", "")


@pytest.mark.parametrize(
    ("given", "loaded", "expected"),
    [
        ({}, "", "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "", "ACTIVE"),
        ({"GOMP_SPINCOUNT": "1000"}, "", "None"),
        ({"KMP_BLOCKTIME": "200"}, "", "None"),
        ({}, "import sys; sys.modules['torch'] = sys; ", "None"),  # too late
    ],
)
def test_threads_sleep_while_they_wait_unless_told_otherwise(
    given: dict[str, str], loaded: str, expected: str
) -> None:
    program = (
        f"{loaded}import os; from egspo.cli import sleep_while_waiting as f; f(); "
        "print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    variables = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
    kept = {name: value for name, value in os.environ.items() if name not in variables}
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, env={**kept, **given}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.slow
def test_the_runtime_of_torch_hears_of_it() -> None:
    """The command loads no torch before it has said so."""
    program = "from egspo.cli import main; import sys; assert 'torch' not in sys.modules; "
    program += "main(['doctor'])"
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "OMP_DISPLAY_ENV": "true"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("the OpenMP runtime of this torch does not display its settings")
    assert re.search(r"OMP_WAIT_POLICY\s*=\s*'PASSIVE'", done.stderr)
