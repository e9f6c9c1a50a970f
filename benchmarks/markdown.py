"""Pieces of Markdown that studies share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rows = [list(head), ["---", *["--:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def made_on(content: Mapping[str, Any], commits: Iterable[str]) -> str:
    """Hardware, versions, commits and the command of a result file."""
    shown = ", ".join(f"`{commit}`" for commit in sorted(set(commits)))
    return (
        f"{content['cpu']}, threads {content['threads']}; Python {content['python']}, torch "
        f"{content['versions']['torch']}; commit {shown}.\n\n```bash\n{content['command']}\n```"
    )
