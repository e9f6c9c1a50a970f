"""``egspo train``, ``sft`` and ``sweep``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from egspo.cli.common import AddCommand, configure_output, is_main_process
from egspo.files import set_aside

if TYPE_CHECKING:
    from egspo.config import TrainConfig
    from egspo.training.continuation import Resume

_TRAIN_EPILOG = """\
overrides:
  key=value pairs change single options of the recipe, with dots between the
  sections and YAML values:

    egspo {command} RECIPE seed=3 optimizer.learning_rate=1e-4 model.lora.rank=16
    egspo {command} RECIPE model.config=null model.path=GSAI-ML/LLaDA-8B-Instruct
    egspo {command} RECIPE 'task.options.empty_cells=[4, 8]'

an interrupted run:
    egspo {command} RECIPE --resume              from the newest checkpoint in output_dir
    egspo {command} RECIPE --resume FOLDER       from that checkpoint, or that run's newest
    egspo {command} RECIPE --resume auto         the same command for the first start and every
                                         restart: from the newest intact checkpoint in
                                         output_dir, from the beginning without one
"""
_PROCESSES_EPILOG = """
several GPUs:
    accelerate launch -m egspo.cli train RECIPE
"""
_METRICS_FILES = ("metrics.jsonl", "sft_metrics.jsonl")


def add_commands(add: AddCommand) -> None:
    for name, text, run in (
        ("train", "train a model by reinforcement learning", _train),
        (
            "sft",
            "train a model on the task's reference completions (the recipe's sft section)",
            _sft,
        ),
    ):
        epilog = _TRAIN_EPILOG.format(command=name)
        epilog += _PROCESSES_EPILOG if name == "train" else ""
        command = add(name, text, run, epilog)
        _add_training_arguments(command)
        if name == "train":
            command.add_argument(
                "--dry-run",
                action="store_true",
                help="check recipe, data and model and estimate memory; loads no weights, "
                "writes nothing",
            )
    sweep = add("sweep", "run variants of a recipe with several seeds and compare them", _sweep)
    sweep.add_argument("sweep", metavar="SWEEP", type=Path, help="YAML file, see docs/sweeps.md")
    sweep.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)"
    )
    sweep.add_argument("--output-dir", metavar="DIR", help="instead of the sweep's output_dir")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT_OR_RUN",
        help="continue; without a value from the newest checkpoint in output_dir; auto: begin "
        "where there is none yet",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start over where there is a run; the old folder is kept as DIR.old-TIMESTAMP",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="only print the effective recipe, with what each value came from",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="same as output_dir=DIR")
    parser.add_argument("--seed", type=int, metavar="N", help="same as seed=N")


def _configured(args: argparse.Namespace) -> TrainConfig:
    from egspo.config.recipe import load_config

    return load_config(args.recipe, _overrides(args))


def _overrides(args: argparse.Namespace) -> list[str]:
    overrides = list(args.overrides)
    if args.output_dir is not None:
        overrides.append(f"output_dir={json.dumps(args.output_dir)}")
    if args.seed is not None:
        overrides.append(f"seed={args.seed}")
    return overrides


def _prepare_output(args: argparse.Namespace, config: TrainConfig) -> Resume:
    """Keep what earlier runs produced; returns what to resume from.

    Raises:
        ValueError: ``output_dir`` has a run and nothing says what to do about it.
    """
    output = Path(config.output_dir)
    if args.resume is not None and args.overwrite:
        raise ValueError("--resume continues a run, --overwrite starts over: give one of them")
    if args.resume == "auto":
        return "auto"
    resume = None if args.resume is None else Path(args.resume or output)
    continued = resume is not None and resume.resolve().is_relative_to(output.resolve())
    occupied = any((output / name).exists() for name in _METRICS_FILES)
    if not occupied or continued or not is_main_process():
        return resume
    if args.overwrite:
        from egspo.runs.folder import check_run
        from egspo.runs.lock import RunLock

        check_run(output)
        RunLock(output).release()  # nobody else is writing there
        print(f"egspo: the earlier run is kept in {set_aside(output)}", file=sys.stderr)
        return None
    finished = (output / "final").is_dir()
    lines = [f"{output} already has a{' finished' if finished else 'n unfinished'} run. Either"]
    if any((output / "checkpoints").glob("step-*")):
        longer = " steps=N   train it further, to N steps" if finished else "   continue it"
        lines.append(f"  --resume{longer}")
    else:
        lines.append("  --resume auto   begin again: it has no checkpoint yet")
    lines.append("  --overwrite   start over; the old folder is renamed, not deleted")
    lines.append("  --output-dir DIR   start another run beside it")
    raise ValueError("\n".join(lines))


def _train(args: argparse.Namespace) -> None:
    if args.print_config:
        _print_config(args)
        return
    config = _configured(args)
    if args.dry_run:
        _dry_run(args, config)
        return
    resume = _prepare_output(args, config)
    configure_output()
    from egspo.training.trainer import train

    final = train(config, resume=resume)
    if is_main_process():
        _print_outcome(Path(config.output_dir), final)


def _dry_run(args: argparse.Namespace, config: TrainConfig) -> None:
    if args.resume is not None or args.overwrite:
        raise ValueError("--dry-run starts nothing: leave out --resume and --overwrite")
    from egspo.inspection.console import PlainConsole
    from egspo.planning.dry_run import DryRunError, dry_run, print_report

    report = dry_run(config)
    print_report(report, PlainConsole())
    if report.failed:
        names = ", ".join(check.name for check in report.failed)
        raise DryRunError(f"{args.recipe} would not run: {names}")


def _print_config(args: argparse.Namespace) -> None:
    from egspo.config.describe import with_origins
    from egspo.config.recipe import load_with_origins

    print(with_origins(*load_with_origins(args.recipe, _overrides(args))), end="")


def _sft(args: argparse.Namespace) -> None:
    if args.print_config:
        _print_config(args)
        return
    config = _configured(args)
    resume = _prepare_output(args, config)
    configure_output()
    from egspo.training.warm_start import run_sft

    final = run_sft(config, resume=resume)
    if is_main_process():
        print(f"model: {final}")


def _print_outcome(output: Path, final: Path) -> None:
    """What training achieved on held-out prompts, and where everything is."""
    import torch

    from egspo.engines.processes import world_size
    from egspo.runs.metrics import read_metrics
    from egspo.training.outcome import outcome

    gpus = world_size() if torch.cuda.is_available() else 0
    print("\n".join(outcome(output, final, read_metrics(output), gpus)))
    print(f"curves: {output / 'curves.png'}")


def _sweep(args: argparse.Namespace) -> None:
    configure_output()
    from egspo.evaluations.sweep import PLOT, TABLE, load_sweep, run_sweep

    sweep = load_sweep(args.sweep)
    if args.output_dir is not None:
        sweep.output_dir = args.output_dir
    folder = run_sweep(sweep, jobs=args.jobs)
    print((folder / TABLE).read_text("utf-8"))
    print(f"table: {folder / TABLE}\nplot: {folder / PLOT}")
