"""``egspo generate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from egspo.cli.common import AddCommand, hide_loading_bars
from egspo.cli.model import (
    add_adapter_argument,
    add_generation_arguments,
    given_generation,
    named_model,
)
from egspo.cli.output import (
    JsonlWriter,
    TextWriter,
    Writer,
    answered,
    check_output,
    opened,
)
from egspo.cli.prompts import Prompt, is_jsonl, read_prompts
from egspo.runs.lock import alone

if TYPE_CHECKING:
    from egspo.rollouts.completion import Completion, TextDelta

_GENERATE_EPILOG = """\
examples:
  egspo generate --model runs/sudoku_tiny --temperature 0 --prompt 4000132400120140
  egspo generate --model runs/sudoku_tiny --prompts puzzles.txt --output solved.jsonl
  egspo generate --model runs/sudoku_tiny --prompts puzzles.txt --output solved.jsonl --resume
  egspo generate --model GSAI-ML/LLaDA-8B-Instruct --adapter runs/gsm8k --prompt "..."

prompts in JSONL: {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}
  per line; other keys are repeated in JSONL output.

output: the text of one prompt appears block by block. Of several prompts, text comes in
  their order, each under a line "### PROMPT"; JSONL comes as completions end, with the
  prompt's index, and is on disk line by line: after an interrupt, --resume with the same
  options answers the rest, to the same completions as without the interrupt.
"""
_FORMATS = ("auto", "text", "jsonl")


def add_commands(add: AddCommand) -> None:
    command = add("generate", "answer prompts with a model", _generate, _GENERATE_EPILOG)
    _add_generate_arguments(command)


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_ID", help="a run, folder of weights or hub name")
    add_adapter_argument(parser)
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    add("--prompts", metavar="FILE", help="one prompt per line; - reads standard input")
    for name, what in (("--prompts-format", "of FILE"), ("--format", "of the output")):
        text = f"{what}: text or jsonl (default: jsonl where the name ends in .jsonl)"
        add(name, choices=_FORMATS, default="auto", metavar="NAME", help=text)
    add("--output", type=Path, metavar="FILE", help="instead of standard output")
    add("--resume", action="store_true", help="answer the prompts that FILE (JSONL) lacks")
    add("--overwrite", action="store_true", help="start over where there is a FILE")
    text = "also say when each token was revealed, how confidently, at which entropy"
    add("--step-map", action="store_true", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of the sampling noise (default 0)")
    add_generation_arguments(parser)


def _generate(args: argparse.Namespace) -> None:
    prompts = read_prompts(args)
    file, jsonl = args.output, is_jsonl(args.format, args.output)
    check_output(file, jsonl=jsonl, resume=args.resume, overwrite=args.overwrite)
    with nullcontext() if file is None else alone(file):
        _answer(args, prompts, file, jsonl)


def _answer(
    args: argparse.Namespace, prompts: Sequence[Prompt], file: Path | None, jsonl: bool
) -> None:
    """The prompts that ``file`` lacks."""
    done = answered(file, prompts) if args.resume and file is not None else set()
    if len(done) == len(prompts):
        print(f"egspo: {file} has all {len(prompts)} answers", file=sys.stderr)
        return
    from egspo.serving.generation import stream
    from egspo.serving.named_model import generation_config

    hide_loading_bars()
    chosen = named_model(args)
    config = generation_config(given_generation(args), chosen.trained)
    model, tokenizer = chosen.load()
    messages = [prompt.messages for prompt in prompts]
    events = stream(
        model, tokenizer, messages, config, seed=args.seed, skip=done, step_map=args.step_map
    )
    with opened(file, resume=args.resume, overwrite=args.overwrite) as out:
        writer: Writer
        writer = JsonlWriter(out, prompts, config) if jsonl else TextWriter(out, prompts)
        with closing(writer):
            _write(events, writer, len(done), len(prompts), progress=file is not None)


def _write(
    events: Iterator[TextDelta | Completion],
    writer: Writer,
    done: int,
    total: int,
    *,
    progress: bool,
) -> None:
    """All events, with a bar on a terminal that shows nothing else."""
    from egspo.rollouts.completion import Completion
    from egspo.training.progress import RunProgress, stderr_console

    shown = progress and stderr_console().is_terminal
    with RunProgress(total, "generate", start=done, enabled=shown) as bar:
        for event in events:
            if isinstance(event, Completion):
                writer.completion(event)
                done += 1
                bar.update(done, {})
            else:
                writer.delta(event)
