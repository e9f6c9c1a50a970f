"""Texts that a model or a file holds, as they cannot steer a terminal."""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

# Controls, formats (which turn the direction of writing), halves of a character, private ones, and
# the line breaks that no file means.
_STEERING = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def printable(text: str) -> str:
    """``text`` with what steers a terminal as ``\\x1b``; its lines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def show(*values: Any) -> None:
    """``print`` on standard output, of texts that somebody else wrote."""
    sys.stdout.write(" ".join(printable(str(value)) for value in values) + "\n")


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _STEERING:
        return character
    code = ord(character)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )
