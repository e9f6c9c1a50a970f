"""``egspo data``: what is in a task or data set, and what two of them share."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from egspo.cli.common import AddCommand, load_tasks_of, named_task
from egspo.cli.score import add_score
from egspo.inspection.printable import show

if TYPE_CHECKING:
    from egspo.tasks.overlap import Overlap

_OVERLAP_FOUND = 3

_EPILOG = """\
what can be named:
  gsm8k:train                    a task and its split (train, validation or test)
  recipes/my_recipe.yaml:test    the task of a recipe
  openai/gsm8k/main:train        a data set on the hub: OWNER/NAME[/CONFIG][:SPLIT]
  data/problems.jsonl            a file (.parquet, .jsonl, .json, .csv) or folder[:SPLIT]

examples:
  egspo data overlap gsm8k:train gsm8k:test
  egspo data overlap my_train.jsonl openai/gsm8k/main:test --column question
  egspo data show countdown prompt_style=digits
"""
_OVERLAP_EPILOG = """
exit code: 0 no overlap, 3 some; 2 on an error.
"""


def add_commands(add: AddCommand) -> None:
    data = add("data", "inspect and compare tasks and data sets", _help, _EPILOG)
    data.set_defaults(parser=data)
    commands = data.add_subparsers(metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    text = "count the questions that two sets share"
    compare = commands.add_parser(
        "overlap",
        help=text,
        description=f"{text}.",
        epilog=_EPILOG + _OVERLAP_EPILOG,
        formatter_class=raw,
    )
    compare.add_argument("a", metavar="A", help="a task's split or a data set, see below")
    compare.add_argument("b", metavar="B")
    compare.add_argument("--column", metavar="NAME", help="of the question, in data sets")
    compare.add_argument(
        "--examples", type=int, default=5, metavar="N", help="pairs to show (default 5)"
    )
    compare.add_argument("--json", action="store_true", help="machine-readable")
    compare.set_defaults(run=_overlap)

    text = "print the first examples of a task, and its rewards"
    shown = commands.add_parser(
        "show", help=text, description=f"{text}.", epilog=_EPILOG, formatter_class=raw
    )
    shown.add_argument("task", metavar="TASK", help="name of a task, or a recipe")
    shown.add_argument(
        "options", nargs="*", metavar="key=value", help="of the task, or overrides of the recipe"
    )
    shown.add_argument("--split", default="train", metavar="NAME", help="train (default), ...")
    shown.add_argument("--examples", type=int, default=2, metavar="N", help="(default 2)")
    shown.set_defaults(run=_show)
    add_score(commands)
    for command in (compare, shown):
        command.add_argument("--file", metavar="FILE", help="Python file that registers tasks")
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def _help(args: argparse.Namespace) -> None:
    parser: argparse.ArgumentParser = args.parser
    parser.print_help()


def _prepare(args: argparse.Namespace) -> None:
    if args.examples < 0:
        raise ValueError(f"--examples must be >= 0, got {args.examples}")
    load_tasks_of(args.file)


def _overlap(args: argparse.Namespace) -> None:
    from egspo.tasks.overlap import overlap

    _prepare(args)
    found = overlap(
        _questions(args.a, args.column), _questions(args.b, args.column), examples=args.examples
    )
    if args.json:
        print(json.dumps({"a": args.a, "b": args.b, **asdict(found)}, indent=1))
    else:
        _print_overlap(args.a, args.b, found)
    if found.normalised[0]:
        raise SystemExit(_OVERLAP_FOUND)


def _print_overlap(a: str, b: str, found: Overlap) -> None:
    show(f"{'':24}{'A':>12}{'B':>12}    A = {a}, B = {b}")
    for label, counts in (
        ("questions", found.size),
        ("distinct", found.distinct),
        ("in the other, exactly", found.exact),
        ("in the other, normalised", found.normalised),
    ):
        show(f"{label:24}{counts[0]:>12}{counts[1]:>12}")
    for number, (left, right) in enumerate(found.examples, start=1):
        show(f"\n{number}. A: {left}\n   B: {right if right != left else '(the same)'}")


def _questions(name: str, column: str | None) -> list[str]:
    from egspo.tasks.data import split_source
    from egspo.tasks.overlap import questions, task_questions

    path, split = split_source(name)
    if not _is_task(path):
        return questions(name, column)
    if split is None:
        raise ValueError(f"{name} is a task: name its split, {name}:train, :validation or :test")
    return task_questions(named_task(path, []), split)


def _is_task(name: str) -> bool:
    from egspo.tasks import registered_tasks

    return Path(name).suffix in (".yaml", ".yml") or name in registered_tasks()


def _show(args: argparse.Namespace) -> None:
    from egspo.tasks.overlap import split_of

    _prepare(args)
    task = named_task(args.task, args.options)
    sizes = (("train", task.train), ("validation", task.validation), ("test", task.test))
    show(f"task {task.name}: " + ", ".join(f"{len(part)} {name}" for name, part in sizes))
    for reward in task.rewards:
        also = "" if reward.intermediate else ", not for one-step completions"
        show(f"reward {reward.name}: weight {reward.weight:g}{also}")
    for number, example in enumerate(split_of(task, args.split)[: args.examples]):
        show(f"\n--- {args.split} example {number}")
        for message in example.prompt:
            show(f"[{message['role']}]\n{message['content']}")
        show(f"[columns] {example.columns}")
        if example.target is not None:
            show(f"[target]\n{example.target}")
