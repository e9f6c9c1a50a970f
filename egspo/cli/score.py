"""``egspo data score``: what given completions would earn, and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from egspo.cli.common import load_tasks_of, named_task

if TYPE_CHECKING:
    from egspo.rewards.audit import Audited
    from egspo.tasks import Task

_EPILOG = """\
completions: a JSON object per line,
  {"row": 3, "completion": "..."}                    of the training set
  {"row": 3, "split": "test", "completion": "..."}   of another
  {"prompt": "...", "completion": "..."}             where one row alone has that prompt;
                                                     what `egspo generate` writes will do
output: JSONL, in the same order, with extracted (the answer found), rewards (by name,
  unweighted), reward (their weighted sum), why (by name), solved, split and row.

examples:
  egspo data score gsm8k --completions texts.jsonl
  egspo data score sudoku path=puzzles.csv --completions texts.jsonl --output scores.jsonl
  egspo data score recipes/llada_8b_math500.yaml --completions texts.jsonl
"""
_WIDTH = 140
_LONGEST = 300


def add_score(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "score completions of your own: what is extracted, each reward and why"
    score = commands.add_parser(
        "score",
        help=text,
        description=f"{text}.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("task", metavar="TASK", help="name of a task, or a recipe")
    score.add_argument(
        "options", nargs="*", metavar="key=value", help="of the task, or overrides of the recipe"
    )
    score.add_argument(
        "--completions", required=True, metavar="FILE", help="JSONL, - reads standard input"
    )
    score.add_argument("--output", type=Path, metavar="FILE", help="JSONL of the scores")
    score.add_argument("--file", metavar="FILE", help="Python file that registers tasks")
    score.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    score.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> None:
    from egspo.files import read_user_text, replacing, set_aside
    from egspo.rewards.audit import audit, read_completions
    from egspo.runs.lock import alone

    text = read_user_text(args.completions)
    if args.output is not None and args.output.is_dir():
        raise ValueError(f"--output is a file, and {args.output} is a folder")
    load_tasks_of(args.file)
    task = named_task(args.task, args.options)
    name = "standard input" if args.completions == "-" else args.completions
    audited = audit(task, read_completions(task, text, name))
    _show(task, audited)
    if args.output is None:
        return
    with alone(args.output):
        if args.output.exists():
            print(f"egspo: the earlier file is kept in {set_aside(args.output)}", file=sys.stderr)
        with replacing(args.output) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(_record(each)) + "\n" for each in audited)


def _record(audited: Audited) -> dict[str, object]:
    return {
        "split": audited.split,
        "row": audited.row,
        "extracted": audited.extracted,
        "rewards": audited.rewards,
        "reward": audited.total,
        "why": audited.why,
        "solved": audited.solved,
    }


def _show(task: Task, audited: Sequence[Audited]) -> None:
    """A section per completion, a line per reward."""
    from rich.table import Table
    from rich.text import Text

    from egspo.inspection.console import PlainConsole

    def cell(value: object) -> Text:
        return Text(_shortened(value), overflow="fold")

    table = Table(title=f"task {task.name}")
    for column in ("row", "extracted", "solved", "reward", "pays", "why"):
        table.add_column(column, overflow="fold")
    for each in audited:
        first = [f"{each.split} {each.row}", each.extracted, each.solved]
        for reward in task.rewards:
            pays, why = each.rewards[reward.name], each.why.get(reward.name, "")
            table.add_row(*map(cell, (*first, reward.name, pays, why)))
            first = ["", "", ""]
        table.add_row(*map(cell, (*first, "total, weighted", each.total, "")), end_section=True)
    console = PlainConsole()
    console.width = console.width if console.is_terminal else _WIDTH
    console.print(table)
    solved = [each.solved for each in audited if each.solved is not None]
    totals = [each.total for each in audited if each.total is not None]
    mean = f", mean reward {sum(totals) / len(totals):.3f}" if totals else ""
    counted = f", {sum(solved)} solved" if solved else ""
    print(f"{len(audited)} completions{mean}{counted}")


def _shortened(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    # Of a surrogate that no terminal takes, its escape.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
