"""A trajectory in a terminal: readable at 80 columns, and without colours where it is piped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from egspo.inspection.layout import (
    EOS,
    Block,
    blocks_of,
    differences,
    gain,
    headline,
    number,
    steps_shown,
    title_of,
    token_text,
    visible,
)
from egspo.rollouts.completion import TokenStep
from egspo.runs.samples import TrajectoryRecord

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 64
_MASK = "·"
_EXCERPT = 200  # characters of a one-step completion,
_CONTEXT = 40  # so many of them before the first that differs
_CELL = 10  # columns of a token in a step map, at most


def trajectory_view(
    record: TrajectoryRecord,
    *,
    group: Sequence[TrajectoryRecord],
    source: str,
    every_step: bool = False,
) -> RenderableType:
    """All there is to see of ``record``.

    Args:
        record: one of ``group``.
        group: the trajectories of its file.
        source: where that is from.
        every_step: not only the steps that matter.
    """
    parts: list[RenderableType] = [
        Text(title_of(group, record, source), style="bold"),
        Text(headline(record)),
        _heading("prompt"),
        _indented(_chat(record)),
        _heading("completion"),
        _indented(Text(record.completion or "(no text)")),
        _heading("step entropy", _curve_legend(record)),
        *_curve(record),
        _heading("canvas", _canvas_legend(record, every_step)),
        _canvas(record, every_step),
    ]
    if record.selected:
        parts += [_heading("selected steps", _selected_legend(record)), _selected(record)]
    if any(step.completion is not None for step in record.selected):
        legend = "greedy, of the state before each step"
        parts += [_heading("one-step completions", legend), _one_step(record)]
    if record.prompt_index is not None and len(group) > 1:
        parts += [_heading("group"), group_table(group, record.index)]
    return Group(*parts)


def group_table(group: Sequence[TrajectoryRecord], shown: int | None = None) -> Table:
    """A line for every trajectory of a file."""
    table = _table(" ", "index>", "reward>", "tokens>", "steps>", "completion")
    for record in group:
        table.add_row(
            ">" if record.index == shown else "",
            str(record.index),
            number(record.reward),
            str(record.tokens),
            str(record.steps),
            Text(visible(record.completion), no_wrap=True, overflow="ellipsis"),
        )
    return table


def samples_table(samples: Mapping[int, Sequence[TrajectoryRecord]]) -> Table:
    """A line for every training step that has trajectories."""
    table = _table("step>", "prompt>", "completions>", "mean reward>", "best>", "selected steps>")
    for step, group in samples.items():
        rewards = [record.reward for record in group if record.reward is not None]
        table.add_row(
            str(step),
            str(group[0].prompt_index),
            str(len(group)),
            number(sum(rewards) / len(rewards) if rewards else None),
            number(max(rewards, default=None)),
            str(sum(len(record.selected) for record in group)),
        )
    return table


class StepMapView:
    """A step map with a column for every token, as many beside each other as fit."""

    def __init__(self, step_map: Sequence[TokenStep]) -> None:
        self.step_map = step_map

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        names = ("position", "token", "step", "confidence", "entropy")
        label = max(map(len, names)) + 1
        rows: list[tuple[str, ...]] = []
        width = label
        for token in self.step_map:
            cells = (
                str(token.position),
                visible(token.text),
                str(token.step),
                f"{token.confidence:.2f}",
                f"{token.entropy:.2f}",
            )
            column = 1 + min(_CELL, max(map(cell_len, cells)))
            if width + column > options.max_width and rows:
                yield from self._lines(names, label, rows)
                yield Text("")
                rows, width = [], label
            rows.append(tuple(" " + _fit(cell, column - 1) for cell in cells))
            width += column
        yield from self._lines(names, label, rows)

    def _lines(
        self, names: Sequence[str], label: int, rows: Sequence[tuple[str, ...]]
    ) -> Iterator[Text]:
        for line, name in enumerate(names):
            text = Text(f"{name:<{label}}", style="dim", no_wrap=True)
            text.append("".join(row[line] for row in rows), style="bold" if line == 1 else "")
            yield text


def _fit(text: str, width: int) -> str:
    """To the right, cut off where it is too wide."""
    size = cell_len(text)
    if size > width:
        return set_cell_size(text, width - 1) + "…"
    return " " * (width - size) + text


def _chat(record: TrajectoryRecord) -> Text:
    text = Text()
    for message in record.chat:
        if len(record.chat) > 1:
            text.append(f"{message.get('role')}: ", style="dim")
        text.append(f"{message.get('content')}\n")
    text.rstrip()
    return text


def _curve_legend(record: TrajectoryRecord) -> str:
    known = [value for value in record.entropy if not math.isnan(value)]
    legend = f"nats; full height is {max(known, default=0):.3f}"
    return legend + ("; digits: rank of the selected steps" if record.selected else "")


def _curve(record: TrajectoryRecord) -> Iterator[RenderableType]:
    """The entropy of every step as a bar, the ranks of selected steps below."""
    entropy = record.entropy
    top = max((value for value in entropy if not math.isnan(value)), default=0) or 1.0
    ranks = {selected.step: selected.rank + 1 for selected in record.selected}
    for begin in range(0, len(entropy), _CURVE_WIDTH):
        steps = range(begin, min(begin + _CURVE_WIDTH, len(entropy)))
        bars, marks = Text(f"{begin:>6} "), Text(" " * 7)
        for step in steps:
            value, rank = entropy[step], ranks.get(step)
            bar = " " if math.isnan(value) else _BARS[min(7, int(8 * value / top))]
            bars.append(bar, style="bold yellow" if rank else "cyan")
            marks.append(" " if rank is None else str(rank) if rank < 10 else "+", "bold yellow")
        yield bars
        if record.selected:
            yield marks


def _canvas_legend(record: TrajectoryRecord, every_step: bool) -> str:
    legend = f"[revealed by the step]  {_MASK} masked"
    legend += "" if record.eos_id is None else f"  {EOS} end of text"
    shown = len(steps_shown(record, every_step=every_step))
    if shown < record.steps:
        legend += f"; {shown} of {record.steps} steps, --all-steps shows all"
    return legend


def _canvas(record: TrajectoryRecord, every_step: bool) -> RenderableType:
    """A line per step with the active block: before it nothing changes, after it all is masked."""
    shown = steps_shown(record, every_step=every_step)
    ranks = {selected.step: f"#{selected.rank + 1}" for selected in record.selected}
    table = _table("step>", "rank>", "entropy>", "block")
    blocks = blocks_of(record)
    entropy = record.entropy
    for block in blocks:
        if len(blocks) > 1:
            first, last = block.positions[0], block.positions[-1]
            name = f"block {block.number + 1} of {len(blocks)}, positions {first} to {last}"
            table.add_row("", "", "", Text(name, style="dim italic"))
        for step in block.steps:
            if step in shown:
                line = _canvas_line(block, step, record.eos_id)
                rank = Text(ranks.get(step, ""), style="bold yellow")
                table.add_row(str(step), rank, number(entropy[step]), line)
    return table


def _canvas_line(block: Block, step: int, eos_id: int | None) -> Text:
    line = Text(overflow="fold")
    for token in block.tokens:
        text = token_text(token, eos_id)
        if token.step > step:
            line.append(_MASK, style="dim")
        elif token.step == step:
            line.append(f"[{text}]", style="bold green")
        else:
            line.append(text)
    return line


def _selected_legend(record: TrajectoryRecord) -> str:
    stepwise = any(step.completion is not None for step in record.selected)
    return "V: reward of the one-step completion" if stepwise else ""


def _selected(record: TrajectoryRecord) -> Table:
    stepwise = any(step.completion is not None for step in record.selected)
    values = ["V>", "R - V>"] if stepwise else []
    table = _table("rank>", "step>", "entropy>", *values, "advantage>", "revealed")
    for selected in sorted(record.selected, key=lambda each: each.rank):
        revealed = Text()
        for token in record.step_map:
            if token.step == selected.step:
                text = token_text(token, record.eos_id)
                revealed.append(f"{token.position}", style="dim").append(f" {text}  ")
        extra = []
        if stepwise:
            extra = [number(selected.reward), number(gain(record, selected.reward), sign="+")]
        advantage = number(selected.advantage, sign="+")
        style = "" if selected.advantage is None else "green" if selected.advantage > 0 else "red"
        table.add_row(
            f"#{selected.rank + 1}",
            str(selected.step),
            number(record.entropy[selected.step]),
            *extra,
            Text(advantage, style=style),
            revealed,
        )
    return table


def _one_step(record: TrajectoryRecord) -> Table:
    table, final = _table("rank>", "step>", "V>", "text"), visible(record.completion)
    for selected in sorted(record.selected, key=lambda each: each.rank):
        if selected.completion is None:
            continue
        text, first = Text(overflow="fold"), None
        for piece, differs in differences(visible(selected.completion), final):
            if differs and first is None:
                first = len(text)
            text.append(piece, style="bold magenta" if differs else "")
        if first is not None and len(text) > _EXCERPT and first > _CONTEXT:
            text = Text("…").append_text(text[first - _CONTEXT :])
        text.truncate(_EXCERPT, overflow="ellipsis")
        rank, step = f"#{selected.rank + 1}", str(selected.step)
        table.add_row(rank, step, number(selected.reward), text)
    return table


def _table(*columns: str) -> Table:
    """Without lines; a name that ends in ``>`` is of a column of numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        right = name.endswith(">")
        table.add_column(name.rstrip("> "), justify="right" if right else "left", no_wrap=right)
    return table


def _heading(name: str, legend: str = "") -> Text:
    text = Text("\n").append(name, style="bold")
    return text.append(f"  {legend}", style="dim") if legend else text


def _indented(text: Text) -> Padding:
    return Padding(text, (0, 0, 0, 2))
