"""A run that was stopped, at any moment and in any way, goes on as if it had not been."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from egspo.cli import main
from egspo.config import TrainConfig
from egspo.config.recipe import save_config
from egspo.files import CheckpointError
from egspo.runs.checkpoint import find_checkpoint, list_checkpoints
from egspo.runs.metrics import read_metrics
from egspo.runs.published import publish
from egspo.training.best import BestSoFar
from egspo.training.trainer import train
from egspo.training.warm_start import run_sft
from tests.helpers import runs
from tests.helpers.runs import LETTERS, SIGKILL, SIGTERM, outcome, strike

SIGINT = int(signal.SIGINT)

# Everything at once that has a state or counts steps.
STATEFUL: dict[str, Any] = {
    "steps": 6,
    "algorithm": {
        "lam_schedule": "halving",
        "lam_halving_updates": 2,
        "num_iterations": 2,
        "beta": 0.04,
    },
    "optimizer": {"schedule": "cosine", "warmup_steps": 2},
    "checkpoint": {"every": 2, "keep_last": 1, "keep_best": False},
}
LORA: dict[str, Any] = {"model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.5}}}
SFT: dict[str, Any] = {
    "sft": {
        "steps": 12,
        "batch_size": 4,
        "log_every": 1,
        "optimizer": {"schedule": "linear", "warmup_steps": 3},
    },
    "checkpoint": {"every": 3, "keep_last": 1},
}


@pytest.fixture(autouse=True, scope="module")
def no_plots() -> Iterator[None]:
    """Drawing takes longer than these runs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
        yield


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    return runs.forkserver()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(runs.config(output, STATEFUL))
    return output


def signalled(
    context: ForkServerContext,
    config: TrainConfig,
    target: str,
    call: int,
    number: int = SIGKILL,
    sft: bool = False,
) -> int | None:
    """Exit code of a run that gets a signal at the ``call``-th call of ``target``."""
    process = context.Process(
        target=runs.train_and_signal, args=(config, target, call, number, sft)
    )
    process.start()
    process.join(60)
    return process.exitcode


def slow(*case: Any) -> Any:
    """A case of a test whose others are representative."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("target", "call", "from_step"),
    [
        slow(runs.ROLLOUT, 4, 2),
        slow("egspo.engines.whole.WholeModel.step", 6, 2),  # between two updates of one step
        slow("egspo.runs.metrics._append", 5, 2),  # before the record of a step is written,
        slow("egspo.training.state.save_checkpoint", 2, 2),  # and after, before its checkpoint
        ("egspo.runs.published._digest", 18, 2),  # in the middle of a checkpoint
        slow("egspo.runs.published.delete_published", 1, 4),  # the new one is there, the old too
        slow("egspo.training.trainer.plot_run", 1, 6),
    ],
)
def test_killed_and_resumed_is_bit_identical(
    target: str,
    call: int,
    from_step: int,
    uninterrupted: Path,
    tmp_path: Path,
    processes: ForkServerContext,
) -> None:
    config = runs.config(tmp_path, STATEFUL)
    assert signalled(processes, config, target, call) == -SIGKILL
    assert find_checkpoint(tmp_path).name == f"step-{from_step:06d}"
    train(config, resume=tmp_path)
    assert outcome(tmp_path) == outcome(uninterrupted)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000006"]
    assert not list(tmp_path.glob(".egspo-partial*"))


@pytest.mark.slow
def test_killed_before_the_base_is_kept(
    uninterrupted: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    """The model that the KL goes with appears whole or not at all; nothing was trained yet."""
    config = runs.config(tmp_path, STATEFUL)
    assert signalled(processes, config, "egspo.runs.published._digest", 4) == -SIGKILL
    assert not (tmp_path / "base").exists() and list(tmp_path.glob(".egspo-partial*"))
    train(config)
    assert outcome(tmp_path) == outcome(uninterrupted)
    assert not list(tmp_path.glob(".egspo-partial*"))


@pytest.mark.slow
def test_killed_again_and_again(
    uninterrupted: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    config = runs.config(tmp_path, STATEFUL)
    assert signalled(processes, config, runs.ROLLOUT, 4) == -SIGKILL
    with interrupting(runs.ROLLOUT, 2), pytest.raises(KeyboardInterrupt):
        train(config, resume=tmp_path)
    assert find_checkpoint(tmp_path).name == "step-000003"
    with (
        interrupting("egspo.rewards.training.decode_completions", 1),
        pytest.raises(KeyboardInterrupt),
    ):
        train(config, resume=tmp_path)
    train(config, resume=tmp_path)
    assert outcome(tmp_path) == outcome(uninterrupted)


def test_terminated_saves_first(
    uninterrupted: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    config = runs.config(tmp_path, STATEFUL)
    assert signalled(processes, config, runs.ROLLOUT, 4, SIGTERM) == 128 + SIGTERM
    assert find_checkpoint(tmp_path).name == "step-000003"
    train(config, resume=tmp_path)
    assert outcome(tmp_path) == outcome(uninterrupted)


COMMANDS = {
    "train": (runs.ROLLOUT, ["sft=null", "optimizer.schedule=constant"]),
    "sft": ("egspo.training.sft.supervised_loss", []),
}


@pytest.mark.parametrize(
    ("number", "code"), [(SIGTERM, 143), slow(SIGINT, 130), slow(SIGKILL, -SIGKILL)]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_exit_codes_of_the_command_line(
    command: str, number: int, code: int, tmp_path: Path, processes: ForkServerContext
) -> None:
    """In the fifth step, with a checkpoint every three: only the first two save the fourth."""
    recipe = tmp_path / "recipe.yaml"
    save_config(runs.config(tmp_path / "run", STATEFUL, SFT), recipe)
    target, overrides = COMMANDS[command]
    arguments = [command, str(recipe), *overrides]
    process = processes.Process(target=runs.command_and_signal, args=(arguments, target, 5, number))
    process.start()
    process.join(60)
    assert process.exitcode == code
    saved = 3 if number == SIGKILL else 4
    assert find_checkpoint(tmp_path / "run").name == f"step-{saved:06d}"
    assert not (tmp_path / "run" / "final").exists()
    assert main([*arguments, "--resume"]) == 0
    assert (tmp_path / "run" / "final").is_dir()


class interrupting:
    """A key is pressed just before the ``call``-th call of ``target``."""

    def __init__(self, target: str, call: int) -> None:
        self.arguments = (target, call)

    def __enter__(self) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        self.undo = strike(*self.arguments, interrupt)

    def __exit__(self, *_: object) -> None:
        self.undo()


@pytest.mark.parametrize(
    "changes",
    [
        slow(LORA),
        {**LORA, "algorithm": {"preset": None, "schedule": "per_step", "kl": "exact"}},
        slow({"model": {"config": {"weight_tying": True}}}),
        slow({"algorithm": {"strategy": "random", "schedule": "per_step"}}),
    ],
    ids=["lora", "lora-per-step-exact", "tied", "random-per-step"],
)
def test_interrupted_and_resumed_is_bit_identical(changes: dict[str, Any], tmp_path: Path) -> None:
    """The interrupt comes in step 4, of whose predecessor there is no checkpoint yet."""
    options = (STATEFUL, changes, {"checkpoint": {"every": 0}})
    train(runs.config(tmp_path / "whole", *options))
    config = runs.config(tmp_path / "run", *options)
    with interrupting(runs.ROLLOUT, 4), pytest.raises(KeyboardInterrupt):
        train(config)
    assert find_checkpoint(tmp_path / "run").name == "step-000003"
    train(config, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("target", "call", "kept"),
    [
        ("egspo.training.trainer.evaluate", 1, []),  # before the first step
        (runs.ROLLOUT, 1, []),
        ("egspo.engines.whole.WholeModel.step", 8, ["step-000002"]),  # after half of step 4
        (
            "egspo.training.trainer.evaluate",
            3,
            ["step-000002"],
        ),  # after step 4, unrecorded
        ("egspo.algorithm.phases.rewards.warn_of_failures", 7, ["step-000003"]),
    ],
)
def test_only_whole_steps_are_saved(
    target: str, call: int, kept: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    config = runs.config(tmp_path, STATEFUL)
    with interrupting(target, call), pytest.raises(KeyboardInterrupt):
        train(config)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == kept
    if kept:
        train(config, resume=tmp_path)
        assert outcome(tmp_path) == outcome(uninterrupted)


@pytest.fixture
def no_signal() -> Iterator[None]:
    """Every completion of the task ``letters`` is worth the same: no step updates anything."""
    runs.rewards[:] = [runs.Reward("flat", lambda completions, **_: [1.0] * len(completions))]
    yield
    runs.rewards.clear()


@pytest.mark.usefixtures("no_signal")
def test_a_step_without_an_update_counts_for_the_schedule_once(tmp_path: Path) -> None:
    """The weights are as after step 3, but the learning-rate schedule has moved on already."""
    skips = {"algorithm": {"stepwise": False, "beta": 0.0}}  # groups of equal rewards
    changes = (STATEFUL, LETTERS, skips)
    train(runs.config(tmp_path / "whole", *changes))
    config = runs.config(tmp_path / "run", *changes)
    with interrupting("egspo.training.trainer.evaluate", 3), pytest.raises(KeyboardInterrupt):
        train(config)
    assert find_checkpoint(tmp_path / "run").name == "step-000002"  # not 3, half of 4
    train(config, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    records = read_metrics(tmp_path / "run")[1:]
    assert all(record["updates"] == 0 and record["grad_norm"] is None for record in records)
    assert len({record["lr"] for record in records}) > 3


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be saved after step 1: its checkpoint stays, and the first error is reported."""
    changes = {"steps": 3, "checkpoint": {"every": 1, "keep_last": 1}}
    train(runs.config(tmp_path / "whole", changes))
    config = runs.config(tmp_path / "run", changes)

    def full(target: Path, write: Any) -> None:
        if target.name != "step-000001":
            raise OSError(28, f"No space left on device for {target.name}")
        publish(target, write)

    with monkeypatch.context() as patch:
        patch.setattr("egspo.runs.checkpoint.publish", full)
        with pytest.raises(OSError, match="No space left on device for step-000002"):
            train(config)
        config = runs.config(tmp_path / "run", changes, {"checkpoint": {"every": 0}})
        with interrupting(runs.ROLLOUT, 2), pytest.raises(KeyboardInterrupt):
            train(config, resume=tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").name == "step-000001"
    train(config, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_longer_than_planned(tmp_path: Path) -> None:
    """With a constant learning rate, more steps may be asked for."""
    train(runs.config(tmp_path / "whole", {"steps": 5}))
    train(runs.config(tmp_path / "run", {"steps": 3}))
    train(runs.config(tmp_path / "run", {"steps": 5}), resume=tmp_path / "run")
    whole, run = (outcome(tmp_path / name) for name in ("whole", "run"))
    last = [record for record in run[0] if record["step"] == 3]
    assert any(name.startswith("eval/") for name in last[0])  # the last step of the short run
    assert run[1] == whole[1]
    with pytest.raises(CheckpointError, match=r"step 5, later than the last .* \(steps=4\)"):
        train(runs.config(tmp_path / "run", {"steps": 4}), resume=tmp_path / "run")


def test_resuming_from_an_older_checkpoint_takes_the_later_ones_away(
    uninterrupted: Path, tmp_path: Path
) -> None:
    config = runs.config(tmp_path, STATEFUL, {"checkpoint": {"keep_last": 3}})
    train(config)
    damaged = tmp_path / "checkpoints" / "step-000006" / "state.json"
    damaged.write_text("{}")
    with pytest.raises(CheckpointError, match="step-000004 is intact"):
        train(config, resume=tmp_path)
    with interrupting(runs.ROLLOUT, 2), pytest.raises(KeyboardInterrupt):
        train(config, resume=tmp_path / "checkpoints" / "step-000002")
    assert find_checkpoint(tmp_path).name == "step-000003"
    train(config, resume=tmp_path)
    assert outcome(tmp_path) == outcome(uninterrupted)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, ["seed was 0, now 1"]),
        (
            {"optimizer": {"learning_rate": 1e-3}, "algorithm": {"lam": 0.25}},
            ["optimizer.learning_rate was 0.01, now 0.001", "algorithm.lam was 0.5, now 0.25"],
        ),
        ({"task": {"options": {"empty_cells": 4}}}, ["task.options.empty_cells was [6, 10], now"]),
        (
            LORA,
            [
                f"model.lora.{name} was None, now"
                for name in ("rank", "alpha", "dropout", "experts")
            ],
        ),
        ({"steps": 9}, ["steps was 6, now 9, which optimizer.schedule=cosine depends on"]),
    ],
)
def test_a_changed_configuration_is_refused_by_name(
    changes: dict[str, Any], named: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    config = runs.config(run, STATEFUL, changes)
    with pytest.raises(CheckpointError) as error:
        train(config, resume=run)
    assert all(text in str(error.value) for text in named)
    assert str(error.value).count(", now ") == len(named)
    assert outcome(run) == outcome(uninterrupted)


def test_two_runs_are_not_mixed(uninterrupted: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "run"
    shutil.copytree(uninterrupted, occupied)
    config = runs.config(occupied, STATEFUL)
    for resume in (None, uninterrupted):
        with pytest.raises(CheckpointError, match="checkpoints of another run"):
            train(config, resume=resume)
    assert outcome(occupied) == outcome(uninterrupted)
    new = runs.config(tmp_path / "new", STATEFUL)
    train(new, resume=uninterrupted)  # a branch, beside the run it comes from
    assert outcome(tmp_path / "new") == outcome(uninterrupted)


def test_supervised_training_killed_and_resumed(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    """With dropout, whose random state is the step's own."""
    dropout = {"model": {"config": {"residual_dropout": 0.2}}}
    run_sft(runs.config(tmp_path / "whole", SFT, dropout))
    config = runs.config(tmp_path / "run", SFT, dropout)
    assert (
        signalled(processes, config, "egspo.engines.whole.WholeModel.step", 8, sft=True) == -SIGKILL
    )
    assert find_checkpoint(tmp_path / "run").name == "step-000006"
    with interrupting("egspo.training.sft.supervised_loss", 2), pytest.raises(KeyboardInterrupt):
        run_sft(config, resume=tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").name == "step-000007"
    run_sft(config, resume=tmp_path / "run")
    results = []
    for name in ("whole", "run"):
        file = tmp_path / name / "final" / "model" / "model.safetensors"
        results.append((read_metrics(tmp_path / name / "sft_metrics.jsonl"), file.read_bytes()))
    assert results[0] == results[1]
    assert [record["step"] for record in results[0][0]] == list(range(1, 13))
    for changes, named in (
        ({"sft": {"batch_size": 5}}, "sft.batch_size was 4, now 5"),
        ({"sft": {"steps": 14}}, "sft.steps was 12, now 14, which sft.optimizer.schedule=linear"),
        ({"generation": {"max_new_tokens": 40, "block_length": 20, "steps": 4}}, "max_new_tokens"),
    ):
        with pytest.raises(CheckpointError, match=named):
            run_sft(runs.config(tmp_path / "run", SFT, dropout, changes), resume=tmp_path / "run")
    with pytest.raises(CheckpointError, match="a checkpoint of egspo sft: egspo train cannot"):
        train(config, resume=tmp_path / "run")


def test_a_supervised_run_may_be_longer_than_planned(tmp_path: Path) -> None:
    constant = {"sft": {"optimizer": {"schedule": "constant"}}}
    run_sft(runs.config(tmp_path / "whole", SFT, constant))
    run_sft(runs.config(tmp_path / "run", SFT, constant, {"sft": {"steps": 5}}))
    run_sft(runs.config(tmp_path / "run", SFT, constant), resume=tmp_path / "run")
    whole, run = (
        (tmp_path / name / "final" / "model" / "model.safetensors").read_bytes()
        for name in ("whole", "run")
    )
    assert whole == run


def test_checkpoints_say_what_they_are_of(uninterrupted: Path) -> None:
    state = json.loads((find_checkpoint(uninterrupted) / "state.json").read_text())
    best = BestSoFar.of(read_metrics(uninterrupted))
    assert state == {"command": "train", "step": 6, "best": asdict(best)}
    assert best.step is not None
