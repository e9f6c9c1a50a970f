"""A trajectory as one HTML file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from egspo.inspection.document import html_document
from egspo.inspection.layout import (
    EOS,
    differences,
    gain,
    headline,
    number,
    title_of,
    token_text,
    visible,
)
from egspo.runs.samples import TrajectoryRecord

_STYLE = """
.curve { display: flex; align-items: flex-end; gap: 1px; height: 7rem; margin-top: 1.2rem;
  border-bottom: 1px solid var(--line) }
.curve i { flex: 1; max-width: 2rem; min-width: 1px; background: var(--bar); position: relative;
  cursor: pointer }
.curve i.pick { background: var(--pick) }
.curve i.at { outline: 2px solid var(--ink) }
.curve b { position: absolute; bottom: 100%; left: 50%; transform: translateX(-50%);
  font: 11px system-ui; color: var(--pick) }
.controls { display: flex; gap: .6rem; align-items: center; margin: .6rem 0 }
.controls input { flex: 1 } .controls output { min-width: 12rem }
.t { border-radius: 3px;
  background: color-mix(in srgb, var(--hot) calc(var(--e) * 70%), transparent) }
.t.mask { color: transparent; background: var(--mask) }
.t.now { outline: 2px solid var(--pick) }
tr[data-s] { cursor: pointer }
mark { background: none; color: var(--pick); font-weight: bold }
"""
_SCRIPT = """
const tokens = [...document.querySelectorAll('.t')];
const bars = [...document.querySelectorAll('.curve i')];
const slider = document.querySelector('input'), label = document.querySelector('output');
function show(step) {
  slider.value = step;
  for (const t of tokens)
    t.className = +t.dataset.s > step ? 't mask' : +t.dataset.s === step ? 't now' : 't';
  bars.forEach((bar, s) => bar.classList.toggle('at', s === step));
  label.value = step < 0 ? 'before the first step' : 'after ' + bars[step].title;
}
slider.addEventListener('input', () => show(+slider.value));
for (const [id, by] of [['back', -1], ['on', 1]])
  document.getElementById(id).addEventListener('click', () =>
    show(Math.max(-1, Math.min(bars.length - 1, +slider.value + by))));
for (const e of [...bars, ...document.querySelectorAll('tr[data-s]')])
  e.addEventListener('click', () => show(+e.dataset.s));
show(bars.length - 1);
"""


def trajectory_page(
    record: TrajectoryRecord, *, group: Sequence[TrajectoryRecord], source: str
) -> str:
    """The page of ``record``, with a slider over its steps.

    Args:
        record: one of ``group``.
        group: the trajectories of its file.
        source: where that is from.
    """
    title = title_of(group, record, source)
    chat = "".join(
        f'<p class="soft">{escape(str(message.get("role")))}</p>'
        f"<pre>{escape(str(message.get('content')))}</pre>"
        for message in record.chat
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="soft">{escape(headline(record))}</div>',
        f"<h2>Prompt</h2>{chat}",
        f"<h2>Completion</h2><pre>{escape(record.completion)}</pre>",
        _curve(record),
        _canvas(record),
        _selected(record),
        _group(group, record) if record.prompt_index is not None and len(group) > 1 else "",
    ]
    body = "\n".join(part for part in parts if part)
    return html_document(title, body, style=_STYLE, script=_SCRIPT)


def _curve(record: TrajectoryRecord) -> str:
    """A bar for every step."""
    entropy = record.entropy
    top = max((value for value in entropy if not math.isnan(value)), default=0) or 1.0
    ranks = {selected.step: selected.rank + 1 for selected in record.selected}
    bars = []
    for step, value in enumerate(entropy):
        rank, height = ranks.get(step), 0 if math.isnan(value) else 100 * value / top
        name = f"step {step}, {number(value)} nats" + (f", rank {rank}" if rank else "")
        bars.append(
            f'<i data-s="{step}" title="{name}" style="height:{height:.1f}%"'
            + (f' class="pick"><b>{rank}</b></i>' if rank else "></i>")
        )
    legend = f"nats, at most {number(top)}" + ("; numbers: rank of selected steps" if ranks else "")
    return (
        f'<h2>Step entropy <span class="soft">{legend}</span></h2>'
        f'<div class="curve">{"".join(bars)}</div>'
    )


def _canvas(record: TrajectoryRecord) -> str:
    """Every token, which the slider masks until its step."""
    top = max((token.entropy for token in record.step_map), default=0) or 1.0
    spans = []
    for token in record.step_map:
        text = token_text(token, record.eos_id)
        about = (
            f"position {token.position}, step {token.step}, confidence {token.confidence:.3f}, "
            f"entropy {token.entropy:.3f} nats"
        )
        spans.append(
            f'<span class="t" data-s="{token.step}" style="--e:{token.entropy / top:.3f}" '
            f'title="{about}">{escape(text)}</span>' + ("\n" if "\n" in token.text else "")
        )
    legend = "the darker, the higher the entropy when it was revealed; outlined: by this step"
    legend += f"; {EOS} end of text" if record.eos_id is not None else ""
    last = record.steps - 1
    return (
        f'<h2>Canvas <span class="soft">{legend}</span></h2>'
        '<div class="controls"><button id="back">◀</button>'
        f'<input type="range" min="-1" max="{last}" value="{last}" aria-label="denoising step">'
        '<button id="on">▶</button><output></output></div>'
        f'<div class="canvas">{"".join(spans)}</div>'
    )


def _selected(record: TrajectoryRecord) -> str:
    if not record.selected:
        return ""
    completed = any(selected.completion is not None for selected in record.selected)
    stepwise = completed or any(selected.reward is not None for selected in record.selected)
    names = ["rank", "step", "entropy", *(["V", "R - V"] if stepwise else []), "advantage"]
    rows = []
    for selected in sorted(record.selected, key=lambda each: each.rank):
        advantage = selected.advantage
        kind = "" if not advantage else " good" if advantage > 0 else " bad"
        cells = [f"#{selected.rank + 1}", str(selected.step), number(record.entropy[selected.step])]
        if stepwise:
            cells += [number(selected.reward), number(gain(record, selected.reward), sign="+")]
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        numbers += f'<td class="n{kind}">{number(advantage, sign="+")}</td>'
        text = ""
        if selected.completion is not None:
            text = "".join(
                f"<mark>{escape(piece)}</mark>" if differs else escape(piece)
                for piece, differs in differences(
                    visible(selected.completion), visible(record.completion)
                )
            )
        rows.append(f'<tr data-s="{selected.step}">{numbers}<td class="text">{text}</td></tr>')
    legend = "V: reward of the greedy one-step completion of the state before" if completed else ""
    legend = "V: what the value head predicts" if stepwise and not completed else legend
    return f'<h2>Selected steps <span class="soft">{legend}</span></h2>' + _table(
        [*names, "one-step completion" if completed else ""], rows
    )


def _group(group: Sequence[TrajectoryRecord], shown: TrajectoryRecord) -> str:
    rows = []
    for record in group:
        name = f"<b>{record.index}</b>" if record.index == shown.index else str(record.index)
        cells = (name, number(record.reward), str(record.tokens), str(record.steps))
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        text = escape(visible(record.completion))
        rows.append(f'<tr>{numbers}<td class="text">{text}</td></tr>')
    names = ("index", "reward", "tokens", "steps", "completion")
    return "<h2>Group</h2>" + _table(names, rows)


def _table(names: Sequence[str], rows: Iterable[str]) -> str:
    """The last column is text, those before it are numbers."""
    header = "".join(f'<th class="n">{name}</th>' for name in names[:-1])
    return f"<table><tr>{header}<th>{names[-1]}</th></tr>{''.join(rows)}</table>"
