"""Random kills: runs that are ended by SIGKILL again and again, and end as if they had not been.

A chain starts a scenario in a folder, kills it, starts it again by the same command, and so on;
at last it may end, and what it left must be, bit for bit, what a run without kills left. Half of
the kills come after a random time, half at a random file operation: what is open, half-written or
just renamed then is what a kill leaves. All but the command lines are forked from a process that
has the imports done, so that a kill costs a fraction of a second.
"""

from __future__ import annotations

import json
import math
import multiprocessing.process
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from egspo.config.recipe import save_config
from egspo.runs.checkpoint import list_checkpoints
from egspo.runs.folder import MARK
from egspo.runs.lock import LOCK
from egspo.runs.published import verify_published
from tests.helpers import runs

SHORT: dict[str, Any] = {
    "steps": 3,
    "algorithm": {"beta": 0.1, "group_size": 2, "selected_steps": 2},
    "eval": {"every": 1},
    "checkpoint": {"every": 1, "keep_last": 1},
    "task": {"options": {"test_examples": 2, "train_examples": 4}},
}
SFT: dict[str, Any] = {
    "sft": {"steps": 6, "batch_size": 2, "log_every": 1},
    "checkpoint": {"every": 2, "keep_last": 1},
}
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "shutil.rmtree"}
_MOST_KILLS = 8
_REACH = 0.8
"""Of a run without kills, at most, when a kill comes: later ones would come too late for a start
that goes on from a checkpoint, which is what reaches the end."""
_PATIENCE = 240.0
_STARTING = threading.Lock()


def train(folder: Path, rank: int) -> None:
    from egspo.training import trainer

    trainer.plot_run = lambda run, png: png  # takes longer than these runs do
    trainer.train(runs.config(folder / "run", SHORT), resume="auto")


def warm(folder: Path, rank: int) -> None:
    from egspo.training import trainer

    trainer.plot_run = lambda run, png: png
    config = runs.config(folder / "run", SHORT, {"steps": 1}, {"sft": SFT["sft"]})
    trainer.train(config, resume="auto")


def supervised(folder: Path, rank: int) -> None:
    from egspo.training.warm_start import run_sft

    run_sft(runs.config(folder / "run", SHORT, SFT), resume="auto")


def evaluation(folder: Path, rank: int) -> None:
    from egspo.cli import main

    lengths = ["--lengths", "20", "--steps", "5", "--block-length", "20"]
    more = ["--limit", "2", "--samples", "3", "--batch-size", "2", "--temperature", "0.7"]
    arguments = ["eval", str(folder.parent / "model" / "run"), *lengths, *more]
    code = main([*arguments, "--output-dir", str(folder / "run")])
    if code:
        raise SystemExit(code)


def together(folder: Path, rank: int) -> None:
    from egspo.training import trainer

    trainer.plot_run = lambda run, png: png
    changes = {"steps": 2, "distributed": {"timeout": 20.0}}
    trainer.train(runs.config(folder / "run", SHORT, changes), resume="auto")


def command_line(folder: Path, rank: int) -> None:
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        save_config(runs.config(folder / "run", SHORT), recipe)
    command = [sys.executable, "-m", "egspo.cli", "train", str(recipe), "--resume", "auto"]
    os.execv(sys.executable, command)


def left_by_training(folder: Path) -> Any:
    run = folder / "run"
    for checkpoint in list_checkpoints(run / "checkpoints"):
        verify_published(checkpoint)
    leftovers = sorted(str(p) for p in run.rglob(".*") if p.name != ".egspo-run")
    names = sorted(p.name for p in run.iterdir() if not p.name.endswith(".dropped.jsonl"))
    return runs.outcome(run) if (run / "metrics.jsonl").exists() else None, leftovers, names


def left_by_sft(folder: Path) -> Any:
    run = folder / "run"
    file = run / "sft_metrics.jsonl"
    weights = {str(f.relative_to(run)): f.read_bytes() for f in run.rglob("final/**/*.safetensors")}
    leftovers = sorted(str(p) for p in run.rglob(".*") if p.name != ".egspo-run")
    return file.read_text(), weights, leftovers


def left_by_evaluation(folder: Path) -> Any:
    run = folder / "run"
    samples = {f.name: f.read_text() for f in sorted((run / "samples").iterdir())}
    return samples, (run / "summary.json").read_text()


@dataclass(frozen=True)
class Scenario:
    """What is killed, and what must be the same afterwards."""

    name: str
    share: float
    """Of all kills."""
    run: Callable[[Path, int], None]
    left: Callable[[Path], Any]
    processes: int = 1
    fresh: bool = False
    """A command line, which mostly imports: its time counts from when it has the run's folder, and
    no kill comes at a file operation."""


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("train", 0.285, train, left_by_training),
        Scenario("warm start", 0.2, warm, left_by_training),
        Scenario("sft", 0.25, supervised, left_by_sft),
        Scenario("eval", 0.15, evaluation, left_by_evaluation),
        Scenario("two processes", 0.1, together, left_by_training, processes=2),
        Scenario("command line", 0.015, command_line, left_by_training, fresh=True),
    )
}


@dataclass
class Report:
    """What happened to the chains of a scenario."""

    kills: int = 0
    starts: int = 0
    ended: int = 0
    """Chains that came to their end, all of them compared."""
    failures: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.kills += other.kills
        self.starts += other.starts
        self.ended += other.ended
        self.failures += other.failures


@dataclass(frozen=True)
class Reference:
    """A run without kills."""

    left: Any
    seconds: float
    events: int


def run_faults(
    folder: Path, kills: int, seed: int, *, names: Sequence[str] = (), jobs: int = 3
) -> dict[str, Report]:
    """At least ``kills`` kills over the scenarios ``names``, all for none, in the empty ``folder``.

    The moments are a function of ``seed``; where in its work a kill by the clock finds a run is
    not. ``jobs`` scenarios go on at a time: one of two processes mostly waits.
    """
    chosen = [SCENARIOS[name] for name in names or SCENARIOS]
    total = sum(scenario.share for scenario in chosen)
    importing = runs.forkserver().Process(target=os.getpid)
    importing.start()
    importing.join()  # so that no reference is slow
    if any(scenario.name == "eval" for scenario in chosen):
        _reference(SCENARIOS["train"], folder / "model")

    def chains(scenario: Scenario) -> Report:
        place = folder / scenario.name.replace(" ", "-")
        wanted = math.ceil(kills * scenario.share / total)
        return _chains(scenario, place, wanted, seed)

    chosen.sort(key=lambda scenario: -scenario.processes)
    with ThreadPoolExecutor(jobs) as pool:
        reports = list(pool.map(chains, chosen))
    return {scenario.name: report for scenario, report in zip(chosen, reports, strict=True)}


def _chains(scenario: Scenario, place: Path, wanted: int, seed: int) -> Report:
    reference, report, number = _reference(scenario, place / "reference"), Report(), 0
    while report.kills < wanted and len(report.failures) < 5:
        most = min(_MOST_KILLS, wanted - report.kills)
        report.add(_chain(scenario, reference, place / str(number), f"{seed} {number}", most))
        number += 1
    return report


def _chain(scenario: Scenario, reference: Reference, folder: Path, seed: str, most: int) -> Report:
    """Starts in ``folder`` until one ends, of which ``most`` are killed."""
    rng, report = random.Random(f"{scenario.name} {seed}"), Report()
    folder.mkdir(parents=True)
    for attempt in range(most + 1):
        last = attempt == most
        by_event = rng.random() < 0.5 and not scenario.fresh
        share = rng.uniform(0.0, _REACH)
        event = None if last or not by_event else 1 + int(share * reference.events)
        delay = None if last or by_event else share * reference.seconds
        victim = rng.randrange(scenario.processes)
        codes = _start(scenario, folder, victim, event, delay)
        report.starts += 1
        report.kills += sum(code == -signal.SIGKILL for code in codes)
        bad = [code for code in codes if code not in (0, -signal.SIGKILL, runs.LOST)]
        if bad or (runs.LOST in codes and -signal.SIGKILL not in codes):
            log = (folder / "log").read_text("utf-8", errors="replace")[-1500:]
            report.failures.append(f"{folder}, start {attempt}: exit codes {codes}\n{log}")
            return report
        if all(code == 0 for code in codes):
            break
    report.ended += 1
    try:
        if scenario.left(folder) != reference.left:
            report.failures.append(f"{folder} differs from the run without kills")
    except Exception as error:
        report.failures.append(f"{folder}: {type(error).__name__}: {error}")
    return report


def _reference(scenario: Scenario, folder: Path) -> Reference:
    folder.mkdir(parents=True)
    if scenario.name == "eval":
        (folder.parent / "model").symlink_to(folder.parent.parent / "model")
    start = time.monotonic()
    codes = _start(scenario, folder, 0, 0, None)
    seconds = time.monotonic() - start
    if scenario.fresh:
        seconds = time.time() - (folder / "run" / MARK).stat().st_mtime
    if any(code != 0 for code in codes):
        raise RuntimeError(f"{scenario.name}: exit codes {codes}\n{(folder / 'log').read_text()}")
    events = int((folder / "events").read_text()) if not scenario.fresh else 0
    return Reference(scenario.left(folder), seconds, events)


def _start(
    scenario: Scenario, folder: Path, victim: int, event: int | None, delay: float | None
) -> list[int | None]:
    """Exit codes of the processes, of which ``victim`` is killed at its file operation ``event``,
    or after ``delay`` seconds."""
    port = runs.free_port()
    started = [
        runs.forkserver().Process(
            target=_attempt,
            args=(scenario.name, folder, rank, port, event if rank == victim else None),
        )
        for rank in range(scenario.processes)
    ]
    for process in started:
        with _STARTING:
            process.start()
            # Or else a start in another thread would ask how this one ended; of two who ask at
            # once, one gets no answer, and takes 255 for the exit code.
            multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    if delay is not None:
        while scenario.fresh and started[victim].is_alive() and not _has_folder(folder, started[0]):
            time.sleep(0.02)
        started[victim].join(delay)
        started[victim].kill()
    deadline = time.monotonic() + _PATIENCE
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [process for process in started if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    return [None if process in hung else process.exitcode for process in started]


def _has_folder(folder: Path, process: BaseProcess) -> bool:
    """Whether the run in ``folder`` is that of ``process``."""
    try:
        holder = json.loads((folder / "run" / LOCK).read_text())
    except FileNotFoundError:
        return False
    return bool(holder["process"] == process.pid)


def _attempt(name: str, folder: Path, rank: int, port: int, event: int | None) -> None:
    """In a process of its own; ``event`` 0 counts the file operations and kills at none."""
    from egspo.engines.processes import LostProcessError

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["EGSPO_CACHE"] = str(folder / "cache")
    scenario = SCENARIOS[name]
    if scenario.processes > 1:
        runs._become_rank(rank, scenario.processes, port)
    count = 0

    def noticed(kind: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if kind in _EVENTS and str(folder) in str(arguments[:2]):
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

    if event is not None:
        sys.addaudithook(noticed)
    try:
        scenario.run(folder, rank)
    except LostProcessError as error:
        print(error, file=sys.stderr)
        raise SystemExit(runs.LOST) from error
    if event == 0:
        (folder / "events").write_text(json.dumps(count))
