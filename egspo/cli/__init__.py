"""The ``egspo`` command. Heavy imports are inside the commands: help must be instant."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from egspo import __version__
from egspo.cli import data, evaluate, export, generate, inspect, options, plan, tools, training
from egspo.cli.common import Command
from egspo.inspection.printable import printable

_DESCRIPTION = """\
Reinforcement learning for masked diffusion language models by entropy-guided
stepwise policy optimisation (EGSPO, EGSPO-SA; arXiv 2603.12554).
"""
_EPILOG = """\
examples:
  egspo train recipes/sudoku_tiny.yaml
  egspo train recipes/sudoku_tiny.yaml algorithm.preset=uniform --output-dir runs/uniform
  egspo train recipes/sudoku_tiny.yaml --resume
  egspo generate --model runs/sudoku_tiny --prompt "..."
  egspo inspect runs/sudoku_tiny

`egspo COMMAND --help` explains a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; returns the exit code.

    0 success, 1 unexpected error (with traceback), 2 wrong usage, configuration, input or
    files, 3 ``egspo plan``: the recipe does not fit, 4 another process was lost, 130 interrupted,
    143 terminated (SIGTERM) after saving.
    """
    sleep_while_waiting()
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    _take_overrides(parser, args, rest)
    # Peft imports bitsandbytes where it is installed, which then advertises a kernel for CPUs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    debug = getattr(args, "debug", False) or os.environ.get("EGSPO_DEBUG", "0") not in ("", "0")
    try:
        run: Command = args.run
        code = run(args)
    except KeyboardInterrupt:
        print("egspo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code = getattr(error, "exit_code", 2) if _is_expected(error) else 1
        if debug or code == 1:
            traceback.print_exc()
        else:
            print(printable(f"egspo: error: {error}"), file=sys.stderr)
        return code
    return code or 0


def sleep_while_waiting() -> None:
    """Has OpenMP threads sleep where they wait for each other, unless the environment says more.

    By default they spin, for as long as another program keeps one of them from its processor. The
    runtime reads the variable when torch loads it: afterwards nothing is changed. Processes started
    from here inherit it.
    """
    chosen = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
    if "torch" not in sys.modules and not any(name in os.environ for name in chosen):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


class _Parser(argparse.ArgumentParser):
    """Its messages repeat what was typed, or came from a script."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message), file)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("egspo", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"egspo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str,
        help_text: str,
        run: Command,
        epilog: str = "",
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=help_text, description=f"{help_text}.", epilog=epilog, formatter_class=raw
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run, overrides=[])
        return command

    for module in (training, plan, options, evaluate, generate, export, inspect, data, tools):
        module.add_commands(add)
    return parser


def _take_overrides(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]
) -> None:
    """Overrides may stand anywhere; argparse only takes those right behind the recipe."""
    if not hasattr(args, "recipe"):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return
    args.overrides = list(args.overrides)
    resume = getattr(args, "resume", None)
    if resume and "=" in resume and not Path(resume).exists():
        args.overrides.append(resume)  # --resume key=value
        args.resume = ""
    args.overrides += rest
    for text in args.overrides:
        if "=" not in text or text.startswith("-"):
            parser.error(f"unrecognized argument: {text} (overrides have the form key=value)")


def _is_expected(error: Exception) -> bool:
    """Whether the message alone says what to change: bad input, files, or an error of egspo's."""
    own = type(error).__module__.partition(".")[0] in ("egspo", "egspo_kernels")
    return own or isinstance(error, ValueError | OSError | FloatingPointError)
