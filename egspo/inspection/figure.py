"""A trajectory as a figure: a row for every denoising step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator

from egspo.inspection.layout import blocks_of, headline, title_of, token_text, visible
from egspo.inspection.plotting import STYLE, save_figure
from egspo.runs.samples import TrajectoryRecord

_MASKED, _KNOWN = "#f2f4f6", "#cfd6dd"
_ORANGE, _GREY, _GREEN, _RED, _INK = "#d9772b", "#8b949e", "#3a9267", "#c0504d", "#24292f"
# Without its palest end, which would pass for a mask.
_COLOURS = ListedColormap(colormaps["YlGnBu"](np.linspace(0.15, 1, 256)))
_LABELLED = 40  # as many positions have room for their tokens
_EXCERPT = 110


def plot_trajectory(
    record: TrajectoryRecord, png_path: Path, *, group: Sequence[TrajectoryRecord], source: str
) -> Path:
    """Draw the canvas by step, and beside it the entropy and what training made of each step.

    Args:
        record: one of ``group``.
        png_path: written atomically.
        group: the trajectories of its file.
        source: where that is from.
    """
    trained = [_advantages] if record.selected else []
    if any(selected.reward is not None for selected in record.selected):
        trained.insert(0, _rewards)
    with rc_context(STYLE):
        height = min(9.0, max(3.2, 1.9 + 0.26 * record.steps))
        figure = Figure(figsize=(11.0, height), dpi=120)
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 1.0 / height))
        _texts(figure, record, title_of(group, record, source))
        widths = [3.4, *[1.0] * (1 + len(trained))]
        panels = figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)
        canvas, *others = panels[0]
        _canvas(figure, canvas, record)
        for draw, axes in zip([_entropy, *trained], others, strict=True):
            draw(axes, record)
            axes.tick_params(labelleft=False)
        return save_figure(figure, png_path)


def _texts(figure: Figure, record: TrajectoryRecord, title: str) -> None:
    inch = 1 / figure.get_figheight()
    options: dict[str, Any] = {"x": 0.008, "ha": "left", "va": "top"}
    figure.text(y=1 - 0.06 * inch, s=title, fontsize=12, fontweight="bold", **options)
    figure.text(y=1 - 0.30 * inch, s=headline(record), fontsize=9, color="#57606a", **options)
    prompt = record.chat[-1]["content"] if record.chat else ""
    for line, (name, text) in enumerate((("prompt", prompt), ("completion", record.completion))):
        shown = _printable(visible(text))
        shown = shown if len(shown) <= _EXCERPT else shown[:_EXCERPT] + "…"
        y = 1 - (0.51 + 0.19 * line) * inch
        # Dollar signs would begin a formula.
        shown = shown.replace("$", r"\$")
        figure.text(y=y, s=f"{name}:  {shown}", fontsize=9, **options)


def _canvas(figure: Figure, axes: Axes, record: TrajectoryRecord) -> None:
    length, steps = record.generation.max_new_tokens, record.steps
    entropies = [token.entropy for token in record.step_map]
    scale = Normalize(0, max([*entropies, 1e-6]))
    image = np.empty((steps, length, 3))
    image[:] = to_rgb(_MASKED)
    for token in record.step_map:
        image[token.step :, token.position] = to_rgb(_KNOWN)
        image[token.step, token.position] = _COLOURS(float(scale(token.entropy)))[:3]
    axes.imshow(image, aspect="auto", interpolation="nearest")
    if length <= _LABELLED:
        for token in record.step_map:
            dark = scale(token.entropy) > 0.5
            axes.text(
                token.position,
                token.step,
                _printable(token_text(token, record.eos_id))[:6].replace("$", r"\$"),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else _INK,
            )
    for block in blocks_of(record)[1:]:
        axes.axvline(block.positions[0] - 0.5, color=_GREY, linewidth=0.6)
    axes.set(title="Canvas", xlabel="position", ylabel="denoising step")
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 8, 10]))
    bar = figure.colorbar(
        ScalarMappable(scale, _COLOURS), ax=axes, pad=0.01, fraction=0.02, aspect=60
    )
    bar.set_label("entropy when revealed, nats")


def _entropy(axes: Axes, record: TrajectoryRecord) -> None:
    values = [0.0 if math.isnan(value) else value for value in record.entropy]
    chosen = {selected.step for selected in record.selected}
    colours = [_ORANGE if step in chosen else "#9fb8cf" for step in range(len(values))]
    axes.barh(range(len(values)), values, color=colours, height=0.85)
    for selected in record.selected:
        axes.annotate(
            f"{selected.rank + 1}",
            (values[selected.step], selected.step),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=_ORANGE,
        )
    axes.set(title="Entropy, nats", xlabel="ranks: selected" if chosen else "")
    axes.margins(x=0.15)


def _rewards(axes: Axes, record: TrajectoryRecord) -> None:
    """Rewards of the one-step completions against that of the completion."""
    known = [(s.reward, s.step) for s in record.selected if s.reward is not None]
    final = record.reward if record.step_reward is None else record.step_reward
    if final is not None:
        axes.axvline(final, color=_GREY, linestyle=(0, (4, 3)), linewidth=1, label="final")
        for value, step in known:
            axes.plot([value, final], [step, step], color=_GREY, linewidth=1, alpha=0.6)
    values, steps = zip(*known, strict=True)
    axes.scatter(values, steps, color=_ORANGE, s=26, zorder=3, label="one-step")
    axes.set(title="Reward")
    axes.margins(x=0.15)
    axes.legend(loc="best")


def _advantages(axes: Axes, record: TrajectoryRecord) -> None:
    known = [(s.advantage, s.step) for s in record.selected if s.advantage is not None]
    for value, step in known:
        axes.barh(step, value, color=_GREEN if value > 0 else _RED, height=0.85)
    axes.axvline(0, color=_GREY, linewidth=1)
    largest = max((abs(value) for value, _ in known), default=0) or 1.0
    axes.set(title="Advantage", xlim=(-1.15 * largest, 1.15 * largest))


def _printable(text: str) -> str:
    """With a box for what the font does not have."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(c if ord(c) in known else "□" for c in text)
