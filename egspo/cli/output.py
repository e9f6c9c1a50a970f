"""What ``egspo generate`` writes: text in the order of the prompts, or JSONL as it comes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from egspo.cli.prompts import Prompt
from egspo.config import GenerationConfig
from egspo.files import naming, set_aside
from egspo.inspection.printable import printable

if TYPE_CHECKING:
    from egspo.rollouts.completion import Completion, TextDelta


class Writer(Protocol):
    """Takes completions, and puts each on disk or screen before it returns."""

    def delta(self, delta: TextDelta) -> None: ...
    def completion(self, completion: Completion) -> None: ...
    def close(self) -> None:
        """Called at the end, an early one too."""


class JsonlWriter:
    """A line per completion, in the order in which they end."""

    def __init__(
        self, stream: TextIO, prompts: Sequence[Prompt], generation: GenerationConfig
    ) -> None:
        self.stream, self.prompts, self.generation = stream, prompts, generation

    def delta(self, delta: TextDelta) -> None:
        pass

    def completion(self, completion: Completion) -> None:
        record: dict[str, Any] = {
            "index": completion.index,
            **self.prompts[completion.index].record,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "tokens": len(completion.token_ids),
        }
        if completion.step_map is not None:
            record["generation"] = asdict(self.generation)
            record["step_map"] = [asdict(token) for token in completion.step_map]
        self.stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.stream.flush()

    def close(self) -> None:
        pass


class TextWriter:
    """The one completion as it grows, or each under a line with its prompt.

    Several are written in the order of their prompts: one that ends early waits for those before
    it. :meth:`close` writes what still waits.
    """

    def __init__(self, stream: TextIO, prompts: Sequence[Prompt]) -> None:
        self.stream, self.prompts = stream, prompts
        self.waiting: dict[int, Completion] = {}
        self.written = 0
        self.shown = 0

    def delta(self, delta: TextDelta) -> None:
        if len(self.prompts) == 1:
            self.shown += len(delta.text)
            self._write(delta.text)

    def completion(self, completion: Completion) -> None:
        self.waiting[completion.index] = completion
        while self.written in self.waiting:
            self._show(self.waiting.pop(self.written))
            self.written += 1

    def close(self) -> None:
        for index in sorted(self.waiting):
            self._show(self.waiting.pop(index))
        if len(self.prompts) == 1 and not self.written and self.shown:
            self._write("\n")  # broken off: the shell's prompt begins a line

    def _show(self, completion: Completion) -> None:
        if len(self.prompts) == 1:
            self._write(completion.text[self.shown :] + "\n")
        else:
            gap = "\n" if completion.index else ""
            title = self.prompts[completion.index].title
            self._write(f"{gap}### {title}\n{completion.text}\n")
        if completion.step_map is not None:
            from egspo.inspection.console import PlainConsole
            from egspo.inspection.terminal import StepMapView

            console = PlainConsole(file=self.stream, highlight=False)
            console.print(StepMapView(completion.step_map))

    def _write(self, text: str) -> None:
        if self.stream.isatty():  # a file or program gets what the model wrote
            text = printable(text)
        self.stream.write(text)
        self.stream.flush()


def check_output(file: Path | None, *, jsonl: bool, resume: bool, overwrite: bool) -> None:
    """Whether ``file`` may be written to.

    Raises:
        ValueError: it exists and nothing says what to do about it, or that cannot be done.
    """
    if resume and overwrite:
        raise ValueError("--resume continues a file, --overwrite starts over: give one of them")
    if (resume or overwrite) and file is None:
        raise ValueError(f"--{'resume' if resume else 'overwrite'} needs --output FILE")
    if resume and not jsonl:
        raise ValueError("--resume needs JSONL output, whose lines say which prompts are done")
    if file is not None and file.is_dir():
        raise ValueError(f"--output is a file, and {file} is a folder")
    if file is None or not file.exists() or resume or overwrite:
        return
    lines = [f"{file} exists already. Either"]
    if jsonl:
        lines.append("  --resume   answer the prompts that it lacks")
    lines.append("  --overwrite   start over; the old file is renamed, not deleted")
    raise ValueError("\n".join(lines))


def answered(file: Path, prompts: Sequence[Prompt]) -> set[int]:
    """Places of the prompts that the JSONL ``file`` has answers to; none if there is no file.

    A last line that was cut short does not count.

    Raises:
        ValueError: a line is not an answer to one of ``prompts``.
    """
    if not file.exists():
        return set()
    done: set[int] = set()
    lines = file.read_text("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        index = _index(line)
        if index is None or not 0 <= index < len(prompts):
            raise ValueError(
                f"{file}, line {number} is not an answer to one of the {len(prompts)} prompts: "
                f"{line[:60]!r}"
            )
        record, asked = json.loads(line), prompts[index].record
        if any(record.get(key) != value for key, value in asked.items()):
            raise ValueError(
                f"{file}, line {number} answers another prompt {index} than the one given now: "
                "--resume needs the same prompts in the same order"
            )
        done.add(index)
    return done


def _index(line: str) -> int | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    index = record.get("index") if isinstance(record, dict) else None
    return index if isinstance(index, int) and "completion" in record else None


@contextmanager
def opened(file: Path | None, *, resume: bool, overwrite: bool) -> Iterator[TextIO]:
    """Standard output, or ``file`` ready for further lines."""
    if file is None:
        yield sys.stdout
        return
    if overwrite and file.exists():
        print(f"egspo: the earlier file is kept in {set_aside(file)}", file=sys.stderr)
    if resume and file.exists():
        _drop_torn_line(file)
    with naming(file), file.open("a" if resume else "x", encoding="utf-8") as stream:
        yield stream


def _drop_torn_line(file: Path) -> None:
    with file.open("rb+") as stream:
        stream.seek(stream.read().rfind(b"\n") + 1, os.SEEK_SET)
        stream.truncate()
