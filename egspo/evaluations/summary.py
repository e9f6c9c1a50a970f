"""The table of an evaluation: on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egspo.evaluations.intervals import Interval, interval_of
from egspo.evaluations.records import Record
from egspo.files import replacing

if TYPE_CHECKING:
    from rich.table import Table

MARKDOWN, JSON = "summary.md", "summary.json"
_METHODS = {
    "wilson": "Wilson score (prompts are right or wrong)",
    "bootstrap": "percentile bootstrap over prompts (10,000 resamples)",
}


@dataclass(frozen=True)
class SummaryRow:
    """One task at one length."""

    task: str
    max_new_tokens: int
    steps: int
    """Denoising steps allowed."""
    prompts: int
    samples: int
    """Completions, of all prompts together."""
    metric: str
    """``solved``, or ``reward`` for a task that defines no such metric."""
    score: float | None
    """Mean over prompts of the mean over their completions; None where nothing was scored."""
    interval: Interval | None
    """95 % interval of the score."""
    rewards: Mapping[str, float]
    """Mean of the total (``reward``) and of every reward function."""
    mean_tokens: float
    """Tokens of a completion, before its end of text."""
    mean_steps: float
    """Denoising steps taken."""
    unfinished: int
    """Completions without an end of text."""
    unscored: int
    """Completions left out of the score, as a reward failed or none applies."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means of the task's other metrics, by name: how others count."""


def summarise(
    task: str, metric: str, max_new_tokens: int, steps: int, records: Sequence[Record]
) -> SummaryRow:
    """Of the samples of a task at a length, of which there must be some."""
    by_prompt: dict[int, list[float]] = {}
    for record in records:
        if record["score"] is not None:
            by_prompt.setdefault(record["index"], []).append(record["score"])
    values = list(by_prompt.values())
    names = sorted({name for record in records for name in record["rewards"]})
    return SummaryRow(
        task=task,
        max_new_tokens=max_new_tokens,
        steps=steps,
        prompts=len({record["index"] for record in records}),
        samples=len(records),
        metric=metric,
        score=_mean(_mean(scores) for scores in values) if values else None,
        interval=interval_of(values, proportion=metric == "solved") if values else None,
        rewards={
            name: _mean(r["rewards"][name] for r in records if name in r["rewards"])
            for name in names
        },
        mean_tokens=_mean(record["tokens"] for record in records),
        mean_steps=_mean(record["steps"] for record in records),
        unfinished=sum(record["finish_reason"] == "length" for record in records),
        unscored=sum(record["score"] is None for record in records),
    )


def write_summary(
    folder: Path, rows: Sequence[SummaryRow], model: str, notes: Sequence[str]
) -> None:
    """``summary.md`` and ``summary.json`` in ``folder``."""
    plain: list[dict[str, Any]] = []
    for row in rows:
        interval = None if row.interval is None else row.interval._asdict()
        plain.append({**asdict(row), "interval": interval})
    content = {"model": model, "notes": list(notes), "results": plain}
    _replace(folder / JSON, json.dumps(content, indent=1, allow_nan=False) + "\n")
    _replace(folder / MARKDOWN, to_markdown(rows, model, notes))


def to_markdown(rows: Sequence[SummaryRow], model: str, notes: Sequence[str]) -> str:
    """The table, with what it is of above and what it means below."""
    others = _others(rows)
    header = ["Task", *_COLUMNS, *others]
    lines = [
        f"{model}",
        "",
        f"| {' | '.join(header)} |",
        f"|---{'|--:' * (len(header) - 1)}|",
        *(f"| {' | '.join([*cells(row), *_metrics(row, others)])} |" for row in rows),
        "",
        *(f"{line}\n" for line in (*footnotes(rows), *notes)),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def to_table(rows: Sequence[SummaryRow], model: str) -> Table:
    """The same for a terminal, without the footnotes."""
    from rich import box
    from rich.table import Table

    table = Table(title=model, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("Task", no_wrap=True)
    others = _others(rows)
    for name in (*_COLUMNS, *others):
        table.add_column(name, justify="right", overflow="fold")  # a cut number says nothing
    for row in rows:
        table.add_row(*cells(row), *_metrics(row, others))
    return table


def _others(rows: Sequence[SummaryRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def _metrics(row: SummaryRow, names: Sequence[str]) -> list[str]:
    return [f"{100 * row.metrics[n]:.1f} %" if n in row.metrics else "-" for n in names]


_COLUMNS = ("Length", "Prompts", "Score", "95 %", "Reward", "Tokens", "Steps")


def cells(row: SummaryRow) -> list[str]:
    """What a line of the table says."""
    scale, unit = (100.0, " %") if row.metric == "solved" else (1.0, "")
    digits = 1 if row.metric == "solved" else 3
    score = "-" if row.score is None else f"{row.score * scale:.{digits}f}{unit}"
    interval = "-"
    if row.interval is not None:
        low, high = row.interval.low * scale, row.interval.high * scale
        interval = f"{low:.{digits}f} - {high:.{digits}f}"
    prompts = str(row.prompts)
    if row.samples > row.prompts:
        prompts += f" x {row.samples / row.prompts:g}"
    reward = f"{row.rewards['reward']:.3f}" if "reward" in row.rewards else "-"
    return [
        row.task,
        str(row.max_new_tokens),
        prompts,
        score,
        interval,
        reward,
        f"{row.mean_tokens:.1f}",
        f"{row.mean_steps:.1f} / {row.steps}",
    ]


def footnotes(rows: Sequence[SummaryRow]) -> list[str]:
    """How scores and intervals are made, and what is missing from them."""
    solved = any(row.metric == "solved" for row in rows)
    others = sorted({row.task for row in rows if row.metric != "solved"})
    scores = ["share of completions solved"] if solved else []
    if others:
        scores.append(f"mean reward ({', '.join(others)})" if solved else "mean reward")
    methods = {row.interval.method for row in rows if row.interval is not None}
    intervals = [text for name, text in _METHODS.items() if name in methods]
    lines = [
        f"Score: {'; '.join(scores)}. Length: of the canvas. Tokens and steps: used, on average."
    ]
    if intervals:
        lines.append(f"95 % intervals: {'; '.join(intervals)}.")
    for row in rows:
        if row.unscored:
            lines.append(
                f"{row.task}, {row.max_new_tokens} tokens: {row.unscored} of {row.samples} "
                "completions are left out of the score, as a reward function failed or none "
                "applies (see errors in the samples)."
            )
    return lines


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def _replace(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
