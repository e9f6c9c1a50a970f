"""What all views of a trajectory share: its blocks, the steps worth showing, its words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from egspo.rollouts.completion import TokenStep
from egspo.runs.samples import TrajectoryRecord

# As many steps are shown without asking which of them matter.
_FEW_STEPS = 16
_VISIBLE = {"\n": "↵", "\t": "⇥", "": "▫"}
EOS = "∎"


@dataclass(frozen=True)
class Block:
    """A block that was denoised."""

    number: int
    """From 0."""
    tokens: list[TokenStep]
    """From left to right."""

    @property
    def steps(self) -> range:
        steps = [token.step for token in self.tokens]
        return range(min(steps), max(steps) + 1)

    @property
    def positions(self) -> range:
        return range(self.tokens[0].position, self.tokens[-1].position + 1)


def blocks_of(record: TrajectoryRecord) -> list[Block]:
    """The blocks that were denoised, from left to right."""
    by_number: dict[int, list[TokenStep]] = {}
    for token in record.step_map:
        by_number.setdefault(token.position // record.generation.block_length, []).append(token)
    return [Block(number, tokens) for number, tokens in sorted(by_number.items())]


def steps_shown(record: TrajectoryRecord, *, every_step: bool) -> set[int]:
    """All steps of a short trajectory; of a long one the selected steps and the ends of blocks."""
    if every_step or record.steps <= _FEW_STEPS:
        return set(range(record.steps))
    ends = {block.steps[-1] for block in blocks_of(record)}
    return ends | {selected.step for selected in record.selected}


def token_text(token: TokenStep, eos_id: int | None) -> str:
    """Of one line and visible; :data:`EOS` for the end of text."""
    return EOS if token.token_id == eos_id else visible(token.text)


def visible(text: str) -> str:
    """``text`` on one line, and without what would steer a terminal."""
    if text in _VISIBLE:
        return _VISIBLE[text]
    return "".join(c if c.isprintable() else _VISIBLE.get(c, f"\\x{ord(c):02x}") for c in text)


def headline(record: TrajectoryRecord) -> str:
    """How long the trajectory is and how it ended."""
    ended = {"eos": "ended by end of text", "length": "no end of text"}[record.finish_reason]
    blocks = len(blocks_of(record))
    parts = [
        f"{record.tokens} of {record.generation.max_new_tokens} tokens",
        f"{record.steps} steps",
        f"{blocks} block{'s' if blocks != 1 else ''}",
        ended,
    ]
    if record.reward is not None:
        parts.append(f"reward {record.reward:.3f}")
    return " · ".join(parts)


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """``value``, or a dash where there is none."""
    return "-" if value is None or value != value else f"{value:{sign}.{digits}f}"


def gain(record: TrajectoryRecord, value: float | None) -> float | None:
    """Reward of the completion beyond that of a one-step completion, ``R - V``."""
    final = record.reward if record.step_reward is None else record.step_reward
    return None if final is None or value is None else final - value


def title_of(group: Sequence[TrajectoryRecord], record: TrajectoryRecord, source: str) -> str:
    """Where a trajectory is from; ``group`` are the trajectories of its file."""
    if record.prompt_index is None:
        return f"{source} · prompt {record.index}"
    return f"{source} · prompt {record.prompt_index} · completion {record.index} of {len(group)}"


def differences(text: str, other: str) -> Iterator[tuple[str, bool]]:
    """``text`` in pieces, and whether each differs from what ``other`` has there."""
    matcher = difflib.SequenceMatcher(None, other, text, autojunk=False)
    for kind, _, _, begin, end in matcher.get_opcodes():
        if end > begin:
            yield text[begin:end], kind != "equal"
