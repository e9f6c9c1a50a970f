"""Consoles on which a text that a model or a file holds cannot steer the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from egspo.inspection.printable import printable


class PlainConsole(Console):
    """A console that writes its own control sequences, and shows those of any text instead."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                text, style, control = segment
                yield Segment(printable(text), style, control)
