"""What a run shows while it goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from egspo.inspection.console import PlainConsole

_LABELS = {
    "reward/mean": "reward",
    "eval/reward": "held-out reward",
    "eval/solved": "held-out solved",
    "entropy/mean": "entropy",
    "speed/tokens_per_second": "tokens/s",
}
_LINES = 20  # about so many plain lines in a run,
_SILENCE = 60.0  # but not longer than so many seconds without one


@cache
def stderr_console() -> Console:
    """The console of progress and log messages: only on a shared one do they not overwrite."""
    return PlainConsole(stderr=True)


class RunProgress:
    """Progress of a run; a context manager.

    Args:
        total: steps of the run.
        description: what runs.
        start: steps made before, by the run that is resumed.
        enabled: False shows nothing (processes other than the main one).
        gpus: that it runs on, for a forecast of GPU-hours; 0 for none.
        console: None for the shared one on standard error.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        start: int = 0,
        enabled: bool = True,
        gpus: int = 0,
        console: Console | None = None,
    ) -> None:
        if total < 1 or not 0 <= start <= total:
            raise ValueError(f"expected 0 <= start <= total and total >= 1, got {start}, {total}")
        self.total, self.description, self.start = total, description, start
        self.enabled, self.gpus = enabled, gpus
        self._console = stderr_console() if console is None else console
        self._values: dict[str, float] = {}
        self._began = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(description, total=total, completed=start, values="")

    def __enter__(self) -> Self:
        self._began = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Steps made so far, and what is known since; values stay shown until replaced."""
        self._values.update({k: float(v) for k, v in values.items() if v is not None})
        if not self.enabled:
            return
        if self._bar is not None:
            shown = "  ".join(f"{name} [cyan]{value}[/]" for name, value in self._shown())
            left = self._left(step)
            if left is not None and self.gpus:
                shown += f"  [cyan]{self._gpu_hours(left)}[/] left"
            self._bar.update(self._task, completed=step, values=shown)
        elif self._line_is_due(step, values):
            self._last_line = time.monotonic()
            self._console.print(self._line(step), markup=False, highlight=False, soft_wrap=True)

    def _shown(self) -> list[tuple[str, str]]:
        return [(_LABELS.get(name, name), f"{value:.4g}") for name, value in self._values.items()]

    def _line_is_due(self, step: int, values: Mapping[str, float | None]) -> bool:
        evaluated = any(name.startswith("eval/") for name in values)
        every = max(1, self.total // _LINES)
        silent = time.monotonic() - self._last_line
        return evaluated or step % every == 0 or step == self.total or silent >= _SILENCE

    def _line(self, step: int) -> str:
        parts = [f"{self.description} {step}/{self.total}"]
        parts += [f"{name} {value}" for name, value in self._shown()]
        elapsed = time.monotonic() - self._began
        parts.append(f"elapsed {duration(elapsed)}")
        left = self._left(step)
        if left is not None:
            hours = f" ({self._gpu_hours(left)})" if self.gpus else ""
            parts.append(f"left {duration(left)}{hours}")
        return "  ".join(parts)

    def _left(self, step: int) -> float | None:
        """Seconds to the end, at the rate so far; None where there is none, or no rate."""
        if not self.start < step < self.total:
            return None
        elapsed = time.monotonic() - self._began
        return elapsed / (step - self.start) * (self.total - step)

    def _gpu_hours(self, seconds: float) -> str:
        return f"{self.gpus * seconds / 3600:.3g} GPU-hours"


def duration(seconds: float) -> str:
    """As ``minutes:seconds``, from an hour on as ``hours:minutes:seconds``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
