"""``egspo generate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from egspo.cli.common import AddCommand, hide_loading_bars
from egspo.cli.model import (
    add_adapter_argument,
    add_generation_arguments,
    generation_config,
    named_model,
)

_GENERATE_EPILOG = """\
examples:
  egspo generate --model runs/sudoku_tiny/final --prompts puzzles.txt --output solved.txt
  egspo generate --model GSAI-ML/LLaDA-8B-Instruct --adapter runs/gsm8k/final --prompt "..."

Decoding options left out are those the model was trained with (egspo_generation.json beside
the weights), or else those of a recipe that does not set them.
"""


def add_commands(add: AddCommand) -> None:
    command = add("generate", "answer prompts with a model", _generate, _GENERATE_EPILOG)
    _add_generate_arguments(command)


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_ID", help="a run, folder of weights or hub name")
    add_adapter_argument(parser)
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    add("--prompts", metavar="FILE", help="one prompt per line; - reads standard input")
    add("--output", type=Path, metavar="FILE", help="instead of standard output")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling noise (default 0)")
    add_generation_arguments(parser)


def _generate(args: argparse.Namespace) -> None:
    prompts = _read_prompts(args)
    from egspo.generation import generate

    hide_loading_bars()
    chosen = named_model(args)
    config = generation_config(args, chosen.trained)
    model, tokenizer = chosen.load()
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
