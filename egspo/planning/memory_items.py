"""The parts of a memory estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Phase = Literal["always", "rollout", "update", "instead", "host"]


@dataclass(frozen=True)
class MemoryItem:
    """A part of the memory of one process."""

    name: str
    bytes: int
    formula: str
    phase: Phase
    """``always``: held throughout. ``rollout`` and ``update`` follow each other. ``instead``: what
    the other setting of gradient checkpointing would take, in no sum. ``host``: memory of the
    host, in no sum either."""


def peak_bytes(items: Sequence[MemoryItem]) -> int:
    """What is held throughout, and the larger of rollout and update."""
    by_phase = {
        phase: sum(item.bytes for item in items if item.phase == phase)
        for phase in ("always", "rollout", "update")
    }
    return by_phase["always"] + max(by_phase["rollout"], by_phase["update"])
