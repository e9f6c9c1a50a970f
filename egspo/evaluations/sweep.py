"""``egspo sweep``: variants of one recipe over several seeds, compared in a table and a plot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from egspo.config import TrainConfig
from egspo.config.convert import ConfigError, from_mapping
from egspo.config.recipe import load_config, read_yaml, task_content
from egspo.files import replacing
from egspo.inspection.plotting import Spent, comparison_table, plot_comparison
from egspo.runs.checkpoint import check_writable
from egspo.runs.lock import RunLock

logger = logging.getLogger("egspo")

PLOT, TABLE = "comparison.png", "comparison.md"


@dataclass
class Sweep:
    """What to run: every variant with every seed."""

    recipe: str
    """The recipe that is varied; a relative path starts at the folder of the sweep."""
    variants: dict[str, list[str]]
    """Overrides (``key=value``) by the name of the variant."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    overrides: list[str] = field(default_factory=list)
    """Of all variants."""
    output_dir: str = "runs/sweep"
    title: str = ""
    x: list[Spent] = field(default_factory=lambda: ["step"])
    """What held-out rewards are drawn against, a panel each. Without ``step`` variants may differ
    in their numbers of steps."""

    def __post_init__(self) -> None:
        for name in ("variants", "seeds", "x"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be distinct, got {self.seeds}")
        for name in self.variants:
            if not name or Path(name).name != name:
                raise ValueError(f"variants: {name!r} cannot be the name of a folder")


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    variant: str
    seed: int
    folder: Path
    arguments: list[str]
    """Recipe and overrides, for ``egspo train``."""

    @property
    def log(self) -> Path:
        """What the run printed; beside the folder, which a run that starts over renames."""
        return self.folder.with_suffix(".log")

    @property
    def finished(self) -> bool:
        return (self.folder / "final").is_dir()


def load_sweep(path: str | os.PathLike[str]) -> Sweep:
    """The sweep at ``path``; raises ConfigError naming everything that is wrong with it."""
    path = Path(path)
    sweep = from_mapping(Sweep, read_yaml(path), str(path))
    sweep.recipe = str(path.parent / sweep.recipe)
    return sweep


def plan(sweep: Sweep, output: Path) -> list[Run]:
    """All runs, seed by seed, so that an interrupted sweep has compared what it has.

    Raises:
        ConfigError: a variant's configuration is invalid, or differs from that of the finished
            run in its place.
    """
    runs = []
    for seed, (variant, overrides) in product(sweep.seeds, sweep.variants.items()):
        folder = output / variant / f"seed-{seed}"
        changes = [*sweep.overrides, *overrides, f"seed={seed}"]
        config = load_config(sweep.recipe, [*changes, f"output_dir={folder}"])
        run = Run(variant, seed, folder, [sweep.recipe, *changes])
        if run.finished:
            _check_same(config, folder)
        runs.append(run)
    return runs


def run_sweep(sweep: Sweep, *, jobs: int = 1) -> Path:
    """Run what is not finished, resume what was interrupted, and compare; returns the folder.

    ``output_dir/VARIANT/seed-N`` are the folders of the runs, what they print is in ``.log`` files
    beside them; the comparison is ``comparison.png`` and ``comparison.md``.

    Args:
        sweep: what to run.
        jobs: runs at a time, which share the CPU's cores.

    Raises:
        OSError: ``output_dir`` cannot be written.
        RunLockedError: another sweep goes on in ``output_dir``.
        RuntimeError: a run failed; the others are finished all the same.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}")
    output = Path(sweep.output_dir)
    runs = plan(sweep, output)
    check_writable(output, 0)
    with RunLock(output):
        return _run_sweep(sweep, output, runs, jobs)


def _run_sweep(sweep: Sweep, output: Path, runs: Sequence[Run], jobs: int) -> Path:
    """In a folder that is this sweep's."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    open_runs = [run for run in runs if not run.finished]
    logger.info("%d of %d runs to do", len(open_runs), len(runs))
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        for run, code in zip(
            open_runs, pool.map(lambda run: _execute(run, environment), open_runs), strict=True
        ):
            state = "finished" if code == 0 else f"FAILED with exit code {code}"
            logger.info("%s, seed %d: %s (%s)", run.variant, run.seed, state, run.log)
            if code != 0:
                failed.append(run)
    if failed:
        names = ", ".join(f"{run.variant} seed {run.seed} ({run.log})" for run in failed)
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs failed: {names}")
    groups = {
        variant: [run.folder for run in runs if run.variant == variant]
        for variant in sweep.variants
    }
    rows = plot_comparison(groups, output / PLOT, title=sweep.title, x=sweep.x)
    with replacing(output / TABLE) as temporary:
        temporary.write_text(comparison_table(rows), encoding="utf-8")
    return output


def _execute(run: Run, environment: Mapping[str, str]) -> int:
    """Train in a process of its own; returns the exit code."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "egspo.cli", "train", *run.arguments]
    with run.log.open("a", encoding="utf-8") as log:
        return subprocess.run(
            [*command, "--output-dir", str(run.folder), "--resume", "auto"],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            check=False,
        ).returncode


def _check_same(config: TrainConfig, folder: Path) -> None:
    saved = load_config(folder / "config.yaml")
    saved.output_dir = config.output_dir
    content, copied = task_content(config, folder)
    if saved != config or content != copied:
        raise ConfigError(
            str(folder),
            ["the finished run here has another configuration: give another output_dir"],
        )
