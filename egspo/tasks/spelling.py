r"""Arithmetic as people and models write it, in the spelling that :mod:`ast` reads.

``\left[ 3 \times 8 \right] + \frac{50}{2}`` becomes ``( 3 * 8 ) + ((50)/(2))``. What is not known
here stays as it is, so that whoever reads the result refuses it.
"""

from __future__ import annotations

import re

_OPERATORS = str.maketrans(
    {
        **dict.fromkeys("\u00d7\u2715\u2716\u2a2f\u2217\u00b7\u22c5\u2022\u2219", "*"),
        **dict.fromkeys("\u00f7\u2215\u2044", "/"),
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63", "-"),
        "\uff0b": "+",
        **dict.fromkeys("\u00a0\u2009\u202f", " "),
    }
)
_BRACKETS = str.maketrans("[]{}", "()()")
_COMMANDS = {
    **dict.fromkeys(("times", "cdot", "ast"), "*"),
    "div": "/",
    **dict.fromkeys(("left", "right", "quad"), " "),
}
_COMMAND = re.compile(rf"\\({'|'.join(_COMMANDS)})(?![a-zA-Z])")
_LATEX_SPACE = re.compile(r"\\[,;:! ]|~")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_TIMES = re.compile(r"(?<=[0-9)\]}])(\s*)[xX](\s*)(?=[-0-9(\[{\\])")
_MARKUP = re.compile(r"`+|\$+|\\[()\[\]]")
_AT_THE_ENDS = ("**", "__", '"', "'")  # bold and quoted; inside, `**` is a power


def sides(text: str) -> list[str]:
    """What stands on the sides of its equals signs, each without markup, in ``+ - * / ( )``."""
    whole = _MARKUP.sub("", text).strip().removesuffix(".")
    return [plain(_bare(side)) for side in whole.split("=")]


def _bare(side: str) -> str:
    before = None
    while side != before:
        before = side = side.strip()
        for mark in _AT_THE_ENDS:
            side = side.removeprefix(mark).removesuffix(mark)
    return side


def plain(expression: str) -> str:
    """One expression, with ``+ - * / ( )`` for all other spellings of these."""
    text = _COMMAND.sub(lambda match: _COMMANDS[match[1]], expression.translate(_OPERATORS))
    text = _LATEX_SPACE.sub(" ", text)
    while (inner := _FRACTION.sub(r"((\1)/(\2))", text)) != text:  # the innermost first
        text = inner
    return _TIMES.sub(r"\1*\2", text).translate(_BRACKETS).strip()
