"""The sample table: what the model wrote at each evaluation, as a page and in the run's trackers.

It shows the groups of trajectories that a run keeps for ``egspo inspect``
(:mod:`egspo.runs.samples`), one row for each completion. Everything in it was written
by a model or is data: all of it is escaped, characters that steer a display are made visible, and
what is huge is cut.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from egspo.files import replacing
from egspo.inspection.document import html_document
from egspo.inspection.layout import number, visible
from egspo.runs.samples import TrajectoryRecord, list_samples, read_trajectories

logger = logging.getLogger("egspo")

SAMPLE_PAGE = "samples.html"
"""File of a run."""
MOST_CHARACTERS = 4000
"""Of a prompt or completion that are shown."""

_STYLE = """
details { border-top: 1px solid var(--line); padding: .5rem 0 }
summary { cursor: pointer; font-variant-numeric: tabular-nums }
details[open] summary { margin-bottom: .5rem }
.prompt { border-left: 3px solid var(--line); padding-left: .8rem; margin: .4rem 0 .8rem }
table { width: 100% } .text { min-width: 16rem }
"""

LogTable = Callable[[int, list[str], list[list[Any]]], object]


@dataclass(frozen=True)
class _Row:
    """A completion as all tables show it."""

    completion: str
    reward: float | None
    rewards: list[float | None]
    steps: list[int]
    """That were trained, in the order of selection."""
    advantages: list[float | None]
    """Of those."""


class SampleTable:
    """Adds a step at a time to the page of a run, and to the trackers that can show a table.

    Args:
        run: folder of the run; :data:`SAMPLE_PAGE` there is written anew with every step.
        trackers: accelerate's, started. One that can show no table is named in the log and left
            out.
        completed: the samples in ``run`` of steps up to this one come first; 0 for none.

    Raises:
        ValueError: one of their files is damaged.
    """

    def __init__(self, run: Path, trackers: Sequence[Any] = (), *, completed: int = 0) -> None:
        self._page, self._title = run / SAMPLE_PAGE, f"{run.absolute().name} · samples"
        self._sections: dict[int, str] = {}
        self._loggers: list[LogTable] = []
        for tracker in trackers:
            log = _logger_of(tracker)
            if log is None:
                logger.info("the sample table is not sent to %s, which shows none", tracker.name)
            else:
                self._loggers.append(log)
        for step, file in list_samples(run).items():
            if step <= completed:
                self._sections[step] = _section(step, read_trajectories(file))

    def add(self, step: int, group: Sequence[TrajectoryRecord]) -> None:
        """Add the trajectories of ``step``, which share a prompt; raises OSError from the page."""
        self._sections[step] = _section(step, group)
        parts = [
            f"<details{' open' if latest == step else ''}>{self._sections[latest]}</details>"
            for latest in sorted(self._sections, reverse=True)
        ]
        hint = "newest first; egspo inspect RUN --step N shows how those of step N came about"
        body = f'<h1>{escape(self._title)}</h1>\n<p class="soft">{hint}</p>\n' + "\n".join(parts)
        with replacing(self._page) as temporary:
            temporary.write_text(html_document(self._title, body, style=_STYLE), "utf-8")
        columns, rows = plain_table(step, group)
        for log in self._loggers:
            log(step, columns, rows)


def plain_table(
    step: int, group: Sequence[TrajectoryRecord]
) -> tuple[list[str], list[list[str | float | None]]]:
    """Names of the columns, and a row for each trajectory of ``group``.

    Selected steps are in the order of selection, and the advantages in the same.
    """
    names = _reward_names(group)
    prompt = _prompt(group)
    columns = ["step", "prompt", "completion", "reward", *(f"reward/{name}" for name in names)]
    rows: list[list[str | float | None]] = []
    for row in _rows(group, names):
        steps = " ".join(map(str, row.steps))
        advantages = " ".join(number(value, sign="+") for value in row.advantages)
        rows.append([step, prompt, row.completion, row.reward, *row.rewards, steps, advantages])
    return [*columns, "selected steps", "advantage"], rows


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """The same for TensorBoard; no text in it can be anything but text."""
    lines = [[_markdown(name) for name in columns], ["---"] * len(columns)]
    for row in rows:
        cells = (number(cell) if cell is None or isinstance(cell, float) else cell for cell in row)
        lines.append([_markdown(str(cell)) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _logger_of(tracker: Any) -> LogTable | None:
    """What sends a table to ``tracker``; None where nothing can."""
    if tracker.name == "tensorboard":
        return lambda step, columns, rows: tracker.log(
            {"samples": markdown_table(columns, rows)}, step=step
        )
    if hasattr(tracker, "log_table"):  # W&B
        return lambda step, columns, rows: tracker.log_table(
            "samples", columns=columns, data=rows, step=step
        )
    return None


def _markdown(text: str) -> str:
    """``text`` in a cell: every mark of punctuation could mean something to Markdown or HTML."""
    safe = (c if c.isalnum() or c == " " or not c.isascii() else f"&#{ord(c)};" for c in text)
    return "".join(safe).replace("&#10;", "<br>")


def _section(step: int, group: Sequence[TrajectoryRecord]) -> str:
    """What opens and closes on the page: the prompt, and a row for each completion."""
    names = _reward_names(group)
    rewards = [record.reward for record in group if record.reward is not None]
    mean = number(statistics.fmean(rewards) if rewards else None)
    about = f"{len(group)} completions · mean reward {mean}"
    if group[0].prompt_index is not None:
        about = f"prompt {group[0].prompt_index} · {about}"
    header = "".join(
        f'<th class="n">{escape(name)}</th>'
        for name in ("reward", *names, "selected steps", "advantage")
    )
    rows = "\n".join(_html_row(row) for row in _rows(group, names))
    return (
        f'<summary>step {step} <span class="soft">· {about}</span></summary>\n'
        f'<pre class="prompt">{escape(_prompt(group))}</pre>\n'
        f"<table><tr>{header}<th>completion</th></tr>\n{rows}</table>"
    )


def _html_row(row: _Row) -> str:
    numbers = [number(value) for value in (row.reward, *row.rewards)]
    advantages = [
        f'<span class="{"good" if value > 0 else "bad"}">{number(value, sign="+")}</span>'
        if value
        else number(value)
        for value in row.advantages
    ]
    lists = ["<br>".join(lines) for lines in (map(str, row.steps), advantages)]
    cells = "".join(f'<td class="n">{cell}</td>' for cell in (*numbers, *lists))
    return f'<tr>{cells}<td class="text">{escape(row.completion)}</td></tr>'


def _rows(group: Sequence[TrajectoryRecord], names: Sequence[str]) -> list[_Row]:
    rows = []
    for record in group:
        selected = sorted(record.selected, key=lambda each: each.rank)
        rows.append(
            _Row(
                _shown(record.completion),
                record.reward,
                [record.rewards.get(name) for name in names],
                [each.step for each in selected],
                [each.advantage for each in selected],
            )
        )
    return rows


def _reward_names(group: Sequence[TrajectoryRecord]) -> list[str]:
    """Of the reward functions that apply to any of ``group``."""
    return list(dict.fromkeys(name for record in group for name in record.rewards))


def _prompt(group: Sequence[TrajectoryRecord]) -> str:
    """The prompt that ``group`` answers; roles are named where it is not one user's message."""
    chat = group[0].chat
    if len(chat) == 1 and chat[0]["role"] == "user":
        return _shown(chat[0]["content"])
    return _shown("\n\n".join(f"{each['role']}: {each['content']}" for each in chat))


def _shown(text: str) -> str:
    """``text`` of at most :data:`MOST_CHARACTERS`, without what would steer a display."""
    lines = text[:MOST_CHARACTERS].split("\n")
    shown = "\n".join(visible(line) if line else "" for line in lines)
    more = len(text) - MOST_CHARACTERS
    return shown if more <= 0 else f"{shown} … ({more:,} more characters)"
