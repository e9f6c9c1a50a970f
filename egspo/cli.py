"""The ``egspo`` command. Heavy imports are inside the commands: help must be instant."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from egspo import __version__
from egspo.config import GenerationConfig, Policy

if TYPE_CHECKING:
    from egspo.config import TrainConfig

_DESCRIPTION = """\
Reinforcement learning for masked diffusion language models by entropy-guided
stepwise policy optimisation (EGSPO, EGSPO-SA; arXiv 2603.12554).
"""
_EPILOG = """\
examples:
  egspo train recipes/sudoku_tiny.yaml
  egspo train recipes/sudoku_tiny.yaml algorithm.preset=uniform --output-dir runs/uniform
  egspo train recipes/sudoku_tiny.yaml --resume
  egspo generate --model runs/sudoku_tiny/final --prompt "..."

`egspo COMMAND --help` explains a command.
"""
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
"""
_PROCESSES_EPILOG = """
several GPUs:
    accelerate launch -m egspo.cli train RECIPE
"""
_GENERATE_EPILOG = """\
examples:
  egspo generate --model runs/sudoku_tiny/final --prompts puzzles.txt --output solved.txt
  egspo generate --model GSAI-ML/LLaDA-8B-Instruct --adapter runs/gsm8k/final --prompt "..."

Decoding options left out are those the model was trained with (egspo_generation.json beside
the weights), or else those of a recipe that does not set them.
"""
_METRICS_FILES = ("metrics.jsonl", "sft_metrics.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; returns the exit code.

    0 success, 1 unexpected error (with traceback), 2 wrong usage, configuration, input or
    files, 130 interrupted.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    _take_overrides(parser, args, rest)
    debug = getattr(args, "debug", False) or os.environ.get("EGSPO_DEBUG", "0") not in ("", "0")
    try:
        run: Callable[[argparse.Namespace], None] = args.run
        run(args)
    except KeyboardInterrupt:
        print("egspo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not _is_expected(error):
            traceback.print_exc()
            return 2 if _is_expected(error) else 1
        print(f"egspo: error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "egspo", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"egspo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, help_text: str, run: Any, epilog: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=help_text, description=f"{help_text}.", epilog=epilog, formatter_class=raw
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run, overrides=[])
        return command

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
        _add_training_arguments(add(name, text, run, epilog))
    _add_generate_arguments(
        add("generate", "answer prompts with a model", _generate, _GENERATE_EPILOG)
    )
    sweep = add("sweep", "run variants of a recipe with several seeds and compare them", _sweep)
    sweep.add_argument("sweep", metavar="SWEEP", type=Path, help="YAML file, see docs/sweeps.md")
    sweep.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)"
    )
    sweep.add_argument("--output-dir", metavar="DIR", help="instead of the sweep's output_dir")
    doctor = add("doctor", "show what this installation can use, and why not the rest", _doctor)
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    plot = add("plot", "redraw curves.png of runs from their metrics", _plot)
    plot.add_argument("run_dir", nargs="+", type=Path, help="output_dir of a run")
    return parser


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT_OR_RUN",
        help="continue; without a value from the newest checkpoint in output_dir",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start over where there is a run; the old folder is kept as DIR.old-TIMESTAMP",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="same as output_dir=DIR")
    parser.add_argument("--seed", type=int, metavar="N", help="same as seed=N")


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_ID", help="a run, folder of weights or hub name")
    add("--adapter", metavar="PATH_OR_ID", help="LoRA adapter (PEFT), or a run that trained one")
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    add("--prompts", metavar="FILE", help="one prompt per line; - reads standard input")
    add("--output", type=Path, metavar="FILE", help="instead of standard output")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling noise (default 0)")
    for name, kind, text in (
        ("max-new-tokens", int, "length of the completion"),
        ("steps", int, "denoising steps"),
        ("block-length", int, "tokens denoised together, left to right"),
        ("temperature", float, "0 decodes greedily"),
        ("batch-size", int, "completions denoised together"),
    ):
        metavar = "N" if kind is int else "X"
        add(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)
    policies = get_args(Policy)
    text = "which positions are unmasked first: " + ", ".join(policies)
    add("--policy", choices=policies, default=argparse.SUPPRESS, metavar="NAME", help=text)


def _take_overrides(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]
) -> None:
    """Overrides may stand anywhere; argparse only takes those right behind the recipe."""
    if not hasattr(args, "recipe"):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return
    args.overrides = list(args.overrides)
    if args.resume and "=" in args.resume and not Path(args.resume).exists():
        args.overrides.append(args.resume)  # --resume key=value
        args.resume = ""
    args.overrides += rest
    for text in args.overrides:
        if "=" not in text or text.startswith("-"):
            parser.error(f"unrecognized argument: {text} (overrides have the form key=value)")


def _configured(args: argparse.Namespace) -> TrainConfig:
    from egspo.recipe import load_config

    overrides = args.overrides
    if args.output_dir is not None:
        overrides = [*overrides, f"output_dir={json.dumps(args.output_dir)}"]
    if args.seed is not None:
        overrides = [*overrides, f"seed={args.seed}"]
    return load_config(args.recipe, overrides)


def _prepare_output(args: argparse.Namespace, config: TrainConfig) -> Path | None:
    """Keep what earlier runs produced; returns what to resume from.

    Raises:
        ValueError: ``output_dir`` has a run and nothing says what to do about it.
    """
    output = Path(config.output_dir)
    if args.resume is not None and args.overwrite:
        raise ValueError("--resume continues a run, --overwrite starts over: give one of them")
    resume = None if args.resume is None else Path(args.resume or output)
    continued = resume is not None and resume.resolve().is_relative_to(output.resolve())
    occupied = any((output / name).exists() for name in _METRICS_FILES)
    if not occupied or continued or not _is_main_process():
        return resume
    if args.overwrite:
        old = output.with_name(f"{output.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        output.rename(old)
        print(f"egspo: the earlier run is kept in {old}", file=sys.stderr)
        return None
    finished = (output / "final").is_dir()
    lines = [f"{output} already has a{' finished' if finished else 'n unfinished'} run. Either"]
    if any((output / "checkpoints").glob("step-*")):
        longer = " steps=N   train it further, to N steps" if finished else "   continue it"
        lines.append(f"  --resume{longer}")
    lines.append("  --overwrite   start over; the old folder is renamed, not deleted")
    lines.append("  --output-dir DIR   start another run beside it")
    raise ValueError("\n".join(lines))


def _train(args: argparse.Namespace) -> None:
    config = _configured(args)
    resume = _prepare_output(args, config)
    _configure_output()
    from egspo.trainer import train

    final = train(config, resume=resume)
    if _is_main_process():
        _print_outcome(Path(config.output_dir), final)


def _sft(args: argparse.Namespace) -> None:
    config = _configured(args)
    resume = _prepare_output(args, config)
    _configure_output()
    from egspo.warm_start import run_sft

    final = run_sft(config, resume=resume)
    if _is_main_process():
        print(f"model: {final}")


def _print_outcome(output: Path, final: Path) -> None:
    """What training achieved on held-out prompts, and where everything is."""
    from egspo.metrics import read_metrics

    records = read_metrics(output)
    for name, label in (("eval/reward", "held-out reward"), ("eval/solved", "held-out solved")):
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            print(f"{label}: {values[0]:.3f} -> {values[-1]:.3f}")
    print(f"model: {final}\ncurves: {output / 'curves.png'}")


def _sweep(args: argparse.Namespace) -> None:
    _configure_output()
    from egspo.sweep import PLOT, TABLE, load_sweep, run_sweep

    sweep = load_sweep(args.sweep)
    if args.output_dir is not None:
        sweep.output_dir = args.output_dir
    folder = run_sweep(sweep, jobs=args.jobs)
    print((folder / TABLE).read_text("utf-8"))
    print(f"table: {folder / TABLE}\nplot: {folder / PLOT}")


def _generate(args: argparse.Namespace) -> None:
    prompts = _read_prompts(args)
    import torch

    from egspo.generation import generate
    from egspo.models import load_adapter, load_model, load_tokenizer

    _hide_loading_bars()
    path = _weights(args.model, "model")
    adapter = None if args.adapter is None else _weights(args.adapter, "adapter")
    trained = path if adapter is None else adapter
    config = _generation_config(args, trained)
    model: Any = load_model(path)
    has_tokenizer = (Path(trained) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(trained if has_tokenizer else path, model.config)
    if adapter is not None:
        model = load_adapter(model, adapter)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    completions = generate(model, tokenizer, messages, config, seed=args.seed)
    _write_completions(prompts, completions, args.output)


def _read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts is not None:
        text = sys.stdin.read() if args.prompts == "-" else Path(args.prompts).read_text("utf-8")
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT, or --prompts FILE with one per line")
    return prompts


def _weights(where: str, kind: str) -> str:
    """The folder of a ``model`` or ``adapter``: ``where``, or inside the run or checkpoint there.

    Anything else is returned as it is: a name on the hub.
    """
    other = "adapter" if kind == "model" else "model"
    for name in (kind, other):
        file = "config.json" if name == "model" else "adapter_config.json"
        for candidate in (Path(where), Path(where, name), Path(where, "final", name)):
            if not (candidate / file).is_file():
                continue
            if name == other:
                hint = f"--model BASE --adapter {where}" if kind == "model" else f"--model {where}"
                raise ValueError(
                    f"{where} has no {kind} but the {other} {candidate}: did you mean {hint}?"
                )
            return str(candidate)
    return where


def _generation_config(args: argparse.Namespace, folder: str) -> GenerationConfig:
    """Defaults, then what is stored beside the weights, then the command line."""
    from dataclasses import fields

    from egspo.generation import GENERATION_FILE
    from egspo.recipe import from_mapping

    file = Path(folder) / GENERATION_FILE
    stored = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    given = {f.name: getattr(args, f.name) for f in fields(GenerationConfig) if f.name in args}
    source = "generation options" + (f" (of {file} and the command line)" if stored else "")
    return from_mapping(GenerationConfig, {**stored, **given}, source)


def _write_completions(prompts: list[str], completions: list[str], file: Path | None) -> None:
    """The completion alone, or each under a line with its prompt."""
    if len(prompts) == 1:
        text = f"{completions[0]}\n"
    else:
        pairs = zip(prompts, completions, strict=True)
        text = "\n".join(f"### {prompt}\n{completion}\n" for prompt, completion in pairs)
    if file is None:
        sys.stdout.write(text)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _doctor(args: argparse.Namespace) -> None:
    from egspo.doctor import diagnose, print_report

    report = diagnose()
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        from rich.console import Console

        print_report(report, Console())


def _plot(args: argparse.Namespace) -> None:
    from egspo.plotting import plot_run

    for run_dir in args.run_dir:
        print(plot_run(run_dir, run_dir / "curves.png"))


def _configure_output() -> None:
    """One progress bar, and the messages of egspo above it, from the main process only."""
    from rich.logging import RichHandler

    from egspo.progress import stderr_console

    for name in ("egspo", "egspo_kernels"):  # the kernels say which backend runs
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if _is_main_process() else logging.WARNING)
        if not logger.handlers:
            handler = RichHandler(
                console=stderr_console(), show_time=False, show_level=False, show_path=False
            )
            logger.addHandler(handler)
    _hide_loading_bars()


def _hide_loading_bars() -> None:
    """Loading and saving weights need no bars; downloads take long and keep theirs."""
    import huggingface_hub.utils
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    huggingface_hub.utils.enable_progress_bars()  # type: ignore[attr-defined, unused-ignore]


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_expected(error: Exception) -> bool:
    """Whether the message alone says what to change: bad input, files, or an error of egspo's."""
    own = type(error).__module__.partition(".")[0] in ("egspo", "egspo_kernels")
    return own or isinstance(error, ValueError | OSError)


if __name__ == "__main__":
    sys.exit(main())
