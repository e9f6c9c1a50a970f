"""Programs in the text of completions, and how they are put behind a preamble."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

# A fence is a line of its own, perhaps the first of a list item; its info string says the language.
# One at the end of a line of code closes too. Runs are matched where they begin, each line once.
_MARK = re.compile(
    r"^(?P<before>[ \t]*(?P<item>(?:[-*+]|[0-9]{1,9}[.)])[ \t]+)?)"
    r"(?P<fence>`{3,}|~{3,})(?![`~])[ \t]*(?P<language>[^\s`~]*)[^\n`~]*$"
    r"|(?<![`~])(?P<end>`{3,}|~{3,})(?![`~])[ \t]*\r?$",
    re.MULTILINE,
)
_CODE_IN_LIST = 4
"""Columns further in than its opening, a fence is a line of the block (CommonMark 0.31, 4.5)."""

_PYTHON = ("python", "py", "python3")
_FIRST_CODE = re.compile(r"^([ \t]*)[^\s#]", re.MULTILINE)
_FIRST_LINE = re.compile(r"^([ \t]*)\S", re.MULTILINE)
_DEFINITION = re.compile(
    r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^\n=]*)?=(?!=)", re.MULTILINE
)


class Block(NamedTuple):
    """A fenced block of a Markdown text."""

    language: str
    """Lower case; empty where it has none."""
    closed: bool
    source: str
    start: int
    end: int
    column: int
    """Of the opening fence: so far its lines may be indented."""

    @property
    def is_python(self) -> bool:
        return self.language in _PYTHON

    @property
    def text(self) -> str:
        """What is in it, without the indentation of the fence."""
        text = self.source[self.start : self.end]
        if not self.column:
            return text
        first = _FIRST_CODE.search(text) or _FIRST_LINE.search(text)
        depth = min(self.column, len(first[1]) if first else 0)
        return re.sub(rf"^[ \t]{{0,{depth}}}", "", text, flags=re.MULTILINE)


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text, in order; those that are opened anew are left out.

    Fences are of backticks or tildes, at any depth of a list, whose indentation is taken off.
    """
    opening: re.Match[str] | None = None
    for mark in _MARK.finditer(text):
        if opening is None:
            opening = mark if mark["fence"] else None
            continue
        fence = mark["fence"] or mark["end"]
        if fence[0] != opening["fence"][0] or len(fence) < len(opening["fence"]):
            continue
        if mark["fence"]:
            if len(mark["before"]) >= len(opening["before"]) + _CODE_IN_LIST:
                continue
            if mark["language"]:  # begins a block, whatever was open before
                opening = mark
                continue
        yield _block(text, opening, mark.start(), closed=True)
        opening = None
    if opening is not None:
        yield _block(text, opening, len(text), closed=False)


def _block(source: str, opening: re.Match[str], end: int, *, closed: bool) -> Block:
    start, column = opening.end() + 1, len(opening["before"])
    return Block(opening["language"].lower(), closed, source, start, end, column)


def extract_program(completion: str, needed: Collection[str] = ()) -> str | None:
    """The program in a completion, or None where there is none.

    It is the block that defines most of the names that are ``needed``, and of several the last
    closed one marked as Python; else the last Python block that is not closed; else the last closed
    block without a language. Text outside of blocks, and blocks of other languages, are no
    programs.
    """
    found = [block for block in blocks(completion) if block.is_python or not block.language]
    candidates = [
        *(block for block in reversed(found) if block.is_python and block.closed),
        *(block for block in reversed(found) if block.is_python and not block.closed),
        *(block for block in reversed(found) if not block.is_python and block.closed),
    ]
    if not candidates:
        return None
    if not needed:
        return candidates[0].text
    # The first of equals.
    return max(candidates, key=lambda block: len(defined_names(block.text, needed))).text


def defined_names(program: str, among: Collection[str]) -> set[str]:
    """Those names that the program defines or assigns at its top level, whether or not it parses.

    Imported ones are not among them: a demonstration imports what it shows.
    """
    found = _DEFINITION.finditer(program) if among else ()
    return {match[1] or match[2] for match in found} & set(among)


def defined_functions(program: str) -> set[str]:
    """Functions and classes that the program defines at its top level."""
    return {match[1] for match in _DEFINITION.finditer(program) if match[1]}


@functools.lru_cache(maxsize=4096)
def names_under_test(tests: str) -> frozenset[str]:
    """What a test file takes from the module ``solution``; nothing if it is no Python."""
    try:
        nodes = list(ast.walk(ast.parse(tests)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "solution":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "solution":
            names.add(node.attr)
    return frozenset(names)


def behind(preamble: str, program: str) -> str:
    """The program behind code that stands before it.

    ``from __future__`` has to be at the beginning of a module: it goes there, from wherever in the
    program it was allowed to be.
    """
    if "__future__" not in program:
        return f"{preamble}\n{program}"
    program = program.replace("\r\n", "\n").replace("\r", "\n")  # as ast counts lines
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return f"{preamble}\n{program}"
    lines = [line.encode("utf-8") for line in program.split("\n")]
    features: list[str] = []
    for node in reversed(body):  # from the end, so that columns stay what they were
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            features = [alias.name for alias in node.names] + features
            assert node.end_lineno is not None
            first, last = node.lineno - 1, node.end_lineno - 1
            rest = lines[last][node.end_col_offset :]
            lines[first : last + 1] = [
                lines[first][: node.col_offset] + b"pass" + rest,
                *[b""] * (last - first),
            ]
    if not features:
        return f"{preamble}\n{program}"
    future = f"from __future__ import {', '.join(dict.fromkeys(features))}"
    return f"{future}\n{preamble}\n" + b"\n".join(lines).decode("utf-8")


def fenced(program: str) -> str:
    """A completion that is this program."""
    return f"```python\n{program.strip()}\n```"
