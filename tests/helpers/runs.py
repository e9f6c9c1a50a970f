"""Tiny training runs: a recipe, a task whose rewards tests can break, and what a run left."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import multiprocessing
import os
import pkgutil
import resource
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from egspo.config import TrainConfig
from egspo.config.convert import from_mapping
from egspo.runs.lock import _identity
from egspo.runs.metrics import deterministic, read_metrics
from egspo.tasks import Example, Reward, Task
from egspo.tasks.base import register_task

# Of matrices this small further threads only wait for each other, long on a busy machine.
torch.set_num_threads(1)

DRIFT = 1e-4
"""Most ``ratio/drift`` of an update on the policy. Sampling adds the exponentials of a row in
another order than scoring, and float32 products in the shapes of the rollout and of the update
differ: log-probabilities of some tokens are off by units in the last place of logits of about 10.
"""
MODEL = {
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "mlp_hidden_size": 24,
    "max_sequence_length": 64,
    "init_std": 0.2,
}
RECIPE: dict[str, Any] = {
    "steps": 4,
    "prompts_per_step": 2,
    "micro_batch_size": 8,
    "model": {"config": MODEL},
    "task": {
        "name": "sudoku",
        "options": {
            "prompt_style": "digits",
            "train_examples": 7,
            "test_examples": 5,
            "empty_cells": [6, 10],
        },
    },
    "generation": {"max_new_tokens": 20, "steps": 5, "block_length": 20, "batch_size": 16},
    "algorithm": {"group_size": 4, "selected_steps": 3, "beta": 0.0},
    "optimizer": {"learning_rate": 1e-2, "max_grad_norm": 1.0},
    "eval": {"every": 2},
    "checkpoint": {"every": 2},
}
LETTERS: dict[str, Any] = {
    "task": {"name": "letters", "options": None},
    "generation": {"max_new_tokens": 8, "steps": 4, "block_length": 4},
}
"""Changes to the recipe for the task that :data:`rewards` scores."""

ROLLOUT = "egspo.algorithm.phases.rollout.rollout_blocks"
"""What every step begins with, to strike a run at."""

rewards: list[Reward] = []
"""Of the task ``letters``: what a test puts here."""


@register_task("letters")
def letters(train: int = 6, test: int = 4, target: str | None = "111111") -> Task:
    examples = [
        Example([{"role": "user", "content": "1234"[: 1 + i % 4]}], {"place": i}, target)
        for i in range(max(train, test))
    ]
    return Task("letters", examples[:train], examples[:test], list(rewards), solved=has_one)


def has_one(completions: Sequence[str], **_: Any) -> list[float]:
    return [float("1" in text) for text in completions]


def ones(completions: Sequence[str], **_: Any) -> list[float]:
    """Share of the 8 tokens that are a one."""
    return [text.count("1") / 8 for text in completions]


def twos(completions: Sequence[str], **_: Any) -> list[float]:
    return [text.count("2") / 8 for text in completions]


def varied(completions: Sequence[str], **_: Any) -> list[float]:
    """Hardly ever the same for two completions."""
    return [sum(ord(c) * (i + 3) for i, c in enumerate(text)) % 23 / 23 for text in completions]


def config(output: Path, *changes: Mapping[str, Any]) -> TrainConfig:
    """The tiny recipe with nested ``changes`` (None takes a key out), written to ``output``."""
    tree = copy.deepcopy(RECIPE)
    for change in ({"output_dir": str(output)}, *changes):
        update(tree, change)
    return from_mapping(TrainConfig, tree, "tiny recipe")


def update(tree: dict[str, Any], change: Mapping[str, Any]) -> None:
    for name, value in change.items():
        if value is None:
            tree.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            update(tree[name], value)
        else:
            tree[name] = copy.deepcopy(value)


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The metrics that do not depend on the clock, and the final weights' files."""
    weights = {
        str(file.relative_to(run)): file.read_bytes()
        for file in sorted((run / "final").rglob("*.safetensors"))
    }
    assert weights
    return [deterministic(record) for record in read_metrics(run)], weights


def strike(target: str, call: int, action: Callable[[], Any]) -> Callable[[], None]:
    """Run ``action`` just before the ``call``-th call of ``module.function`` or
    ``module.Class.method``; returns the undo."""
    owner_name, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original, count = getattr(owner, name), 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, counting)
    return lambda: setattr(owner, name, original)


def train_and_signal(config: TrainConfig, target: str, call: int, number: int, sft: bool) -> None:
    """In a process of its own: train, and send itself signal ``number`` at a chosen moment."""
    from egspo.training.trainer import train
    from egspo.training.warm_start import run_sft

    strike(target, call, lambda: os.kill(os.getpid(), number))
    (run_sft if sft else train)(config)


def command_and_signal(arguments: list[str], target: str, call: int, number: int) -> None:
    """The same by the command line ``egspo ARGUMENTS``."""
    from egspo.cli import main

    # A shell starts its background jobs, and so these tests, with the interrupt ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    strike(target, call, lambda: os.kill(os.getpid(), number))
    raise SystemExit(main(arguments))


def warm_start_at_once(folder: Path, number: int, ready: Any) -> None:
    """In a process of its own: a warm start from the cache in ``folder``, when all are ready."""
    from egspo.models import load_model
    from egspo.tasks.prompts import build_data
    from egspo.training.warm_start import warm_start

    os.environ["EGSPO_CACHE"] = str(folder / "cache")
    tiny = config(folder / str(number), {"sft": {"steps": 1, "batch_size": 2}})
    data = build_data(tiny)
    ready.wait(200)
    load_model(warm_start(tiny, data, torch.device("cpu")))


def command_on_a_full_disk(arguments: list[str], target: str, call: int, log: Path) -> None:
    """The command line ``egspo ARGUMENTS``, which can write nothing more from a chosen moment on;
    ``log`` gets what it says."""
    from egspo.cli import main
    from egspo.training import trainer

    trainer.plot_run = lambda run, png: png  # takes longer than these runs do
    os.environ["EGSPO_CACHE"] = str(log.parent / "cache")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    strike(target, call, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard)))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write_text(said.getvalue())
    raise SystemExit(code)


SIGKILL, SIGTERM, SIGSTOP = (int(s) for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP))


def uneven(completions: Sequence[str], place: Sequence[int], **_: Any) -> list[float]:
    """Teaches something at every other prompt only."""
    return [len(text) / 8 if i % 2 else 0.5 for text, i in zip(completions, place, strict=True)]


PARALLEL: dict[str, Any] = {
    **LETTERS,
    "steps": 4,
    "algorithm": {"schedule": "per_step", "scale_by_std": True},
    # With a tiny eps AdamW's first update is the gradient's sign: where it is 0, its rounding's.
    "optimizer": {"learning_rate": 1e-2, "eps": 1e-2},
    "eval": {"temperature": 1.0},
}
"""A run of which, on two processes, one often has nothing to teach."""


def train_parallel(output: Path, *changes: Mapping[str, Any], resume: Path | None = None) -> None:
    from egspo.training.trainer import train

    rewards[:] = [Reward("uneven", uneven), Reward("ones", partial_ones)]
    try:
        train(config(output, PARALLEL, *changes), resume=resume)
    finally:
        rewards.clear()


@dataclass(frozen=True)
class Strike:
    """What happens to one process: just before the ``call``-th call of ``target`` there."""

    rank: int
    target: str
    call: int
    signal: int


def train_as_rank(
    output: Path,
    rank: int,
    world_size: int,
    port: int,
    changes: Sequence[Mapping[str, Any]],
    resume: Path | None,
    blow: Strike | None,
    on_gpus: bool,
) -> None:
    """In a process of its own, with the environment that torchrun gives it."""
    from egspo.engines.processes import LostProcessError
    from egspo.training import trainer

    trainer.plot_run = lambda run, png: png  # takes longer than these runs do
    if not on_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _become_rank(rank, world_size, port)
    if blow is not None and blow.rank == rank:
        strike(blow.target, blow.call, lambda: os.kill(os.getpid(), blow.signal))
    try:
        train_parallel(output, *changes, resume=resume)
    except LostProcessError as error:
        output.with_name(f"{output.name}.lost-{rank}").write_text(str(error))
        raise SystemExit(LOST) from error


LOST = 77


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start(
    output: Path,
    world_size: int,
    *changes: Mapping[str, Any],
    resume: Path | None = None,
    blow: Strike | None = None,
    seconds: float = 90,
    on_gpus: bool = False,
) -> list[int | None]:
    """Train on several processes; their exit codes by rank, None of one that had to be killed."""
    port = free_port()
    processes = [
        forkserver().Process(
            target=train_as_rank,
            args=(output, rank, world_size, port, changes, resume, blow, on_gpus),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    codes: list[int | None] = [None] * world_size
    # One that was struck may be frozen: nobody waits for it but the others.
    for rank in sorted(range(world_size), key=lambda rank: blow is not None and rank == blow.rank):
        frozen = blow is not None and rank == blow.rank and blow.signal == signal.SIGSTOP
        processes[rank].join(0 if frozen else seconds)
        codes[rank] = processes[rank].exitcode
        processes[rank].kill()
    return codes


def evaluate_as_rank(arguments: list[str], rank: int, world_size: int, port: int) -> None:
    """``egspo`` with ``arguments``, as one of several processes."""
    from egspo.cli import main

    _become_rank(rank, world_size, port)
    raise SystemExit(main(arguments))


def command_as_rank(
    arguments: list[str],
    rank: int,
    world_size: int,
    port: int,
    log: Path,
    blow: Strike | None = None,
) -> None:
    """The same, with what it prints in ``log``."""
    if blow is not None and blow.rank == rank:
        strike(blow.target, blow.call, lambda: os.kill(os.getpid(), blow.signal))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    evaluate_as_rank(arguments, rank, world_size, port)


def evaluate_and_die(arguments: list[str], call: int) -> None:
    """``egspo eval`` that is killed when it is to write its ``call``-th samples."""
    from egspo.cli import main
    from egspo.evaluations.records import SampleFile

    append, count = SampleFile.append, 0

    def counting(self: SampleFile, process: int, records: Any) -> None:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, process, records)

    SampleFile.append = counting  # type: ignore[method-assign]
    main(arguments)


def _become_rank(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def hold_elsewhere(lock: Path) -> None:
    """Write the file ``lock`` as another live process of this machine would."""
    holder = {"token": "x", "host": "here", "since": "then", **_identity(os.getppid())}
    lock.write_text(json.dumps(holder))


def forkserver() -> ForkServerContext:
    """Processes forked from one that has the imports done: a start takes no seconds."""
    context = multiprocessing.get_context("forkserver")
    modules = ["egspo.training.trainer", "egspo.training.warm_start", "egspo.evaluations.run"]
    # With what they are started from, which each would otherwise import for itself.
    modules += ["egspo.cli", "egspo.evaluations.checkpoints", __name__, "tests.faults.harness"]
    context.set_forkserver_preload(modules)
    return context


def partial_ones(completions: Sequence[str], place: Sequence[int], **_: Any) -> list[float | None]:
    """Applies to every third prompt only, and there pays the same for everything."""
    return [0.25 if i % 3 == 0 else None for i in place]
