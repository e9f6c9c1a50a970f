"""What a model or a file says is shown, and never obeyed by the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.panel import Panel
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from egspo.cli import main
from egspo.inspection.console import PlainConsole
from egspo.inspection.printable import printable

EVIL = "a\x1b[2Jb\x1b]0;title\x07c\rd\x9b31me\u202ef\u2028g\ud800"
SHOWN = "a\\x1b[2Jb\\x1b]0;title\\x07c\\x0dd\\x9b31me\\u202ef\\u2028g\\ud800"


def test_what_is_steering_and_what_is_writing() -> None:
    assert printable(EVIL) == SHOWN
    for text in ("plain", "Grüße, 数独 ∎ 🙂", "two\nlines\tand a tab", "\u3000\u00a0"):
        assert printable(text) == text


def written(console: PlainConsole, value: Any) -> str:
    console.print(value)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_that_rich_draws_passes_it_on(terminal: bool) -> None:
    table = Table(EVIL)
    table.add_row(Text(EVIL))
    for value in (Text(EVIL), table, Panel(EVIL, title=EVIL), EVIL):
        console = PlainConsole(
            file=io.StringIO(), force_terminal=terminal, width=300, highlight=False
        )
        text = written(console, value)
        assert SHOWN[:12] in text
        assert "\x1b[2J" not in text and "\x1b]" not in text and "\x07" not in text
        assert not any(ord(c) in (0x9B, 0x202E, 0x2028, 0xD800) for c in text)


def test_a_progress_bar_keeps_its_own_and_no_other() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=300)
    with Progress(TextColumn("{task.description}", markup=False), console=console) as progress:
        progress.add_task(EVIL)
    assert "\x1b[?25l" in file.getvalue()  # hides the cursor
    assert "\\x1b[2J" in file.getvalue() and "\x1b]0" not in file.getvalue()


def test_egspo_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = {"position": 0, "token_id": 1, "text": EVIL[:-1], "step": 0}
    record = {
        "index": 0,
        "completion": EVIL[:-1],
        "prompt": EVIL[:-1],
        "finish_reason": "length",
        "tokens": 1,
        "generation": {"max_new_tokens": 4, "steps": 4, "block_length": 4},
        "step_map": [{**token, "confidence": 0.5, "entropy": 0.5}],
    }
    file = tmp_path / "evil\x1b[2J.jsonl"
    file.write_text(json.dumps(record) + "\n")
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr()
    assert "\\x1b[2Jb" in shown.out and "\x1b" not in shown.out + shown.err
    assert main(["inspect", str(tmp_path / "none\x1b[2J")]) == 2
    assert "none\\x1b[2J" in capsys.readouterr().err
