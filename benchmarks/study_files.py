"""Result files of studies, one of each task, and what the commands that write them share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.budget import Budget
from benchmarks.result_files import RESULTS
from egspo.files import replacing


def add_study_arguments(parser: argparse.ArgumentParser, suite: str) -> None:
    """The flags that every study has."""
    parser.add_argument("--hours", type=float, help="begin nothing that would end later")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--runs", type=Path, default=Path("runs") / suite, help="their folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")


def exit_code(make: Callable[[], Budget]) -> int:
    """Of a command that makes a study; prints what it left out, or why it could not go on."""
    try:
        budget = make()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for what in budget.left_out:
        print(f"left out: {what}")
    return 0


def write_study(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file at ``path`` as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def read_studies(
    folder: Path, suite: str, tasks: Iterable[str], read: Callable[[Path], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The result files of a ``suite`` in a folder, in the order of ``tasks``.

    Raises:
        ValueError: ``read`` refuses one, or there are two of a task.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{suite}-*.json")):
        content = read(path)
        if content["task"] in found:
            raise ValueError(f"{path} is a second result file of the task {content['task']!r}")
        found[content["task"]] = content
    return [found[task] for task in tasks if task in found]
