r"""MATH as the paper's code scores it: string equality after the clean-up of the MATH data set.

Whatever its clean-up cannot handle is compared as it stands. Faults that change numbers: a text
without ``\boxed`` is itself the answer, tags or not; the format never sees a box.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BOX = "\\boxed"
_DROPPED = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def correctness(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the last box, or without a closed one the whole text, equals ``answer``."""
    pairs = zip(completions, answer, strict=True)
    return [float(equal(text if (box := last_box(text)) is None else box, a)) for text, a in pairs]


def boxed_format(completions: Sequence[str], **_: Any) -> list[float]:
    """0.75 with an ``<answer>`` tag, open or closed, else 0.25: a box pays nothing."""
    return [0.75 if "<answer>" in text else 0.25 for text in completions]


def solved(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where what :func:`answer_of` finds equals ``answer``."""
    pairs = zip(completions, answer, strict=True)
    return [float((found := answer_of(text)) is not None and equal(found, a)) for text, a in pairs]


def answer_of(text: str) -> str | None:
    """The last box; without any the whole text; of answer tags the first, and only where the last
    box is empty or not closed."""
    found = last_box(text)
    if found:
        return found
    tagged = _ANSWER.search(text)
    return found if tagged is None else tagged[1].strip()


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed{}`` or ``\fbox{}`` holds; the whole text without one.

    None where it is not closed. ``\boxed 5`` anywhere wins, up to a dollar sign.
    """
    if f"{_BOX} " in text:
        return text.split(f"{_BOX} ")[-1].split("$")[0]
    start = text.rfind(_BOX)
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return text
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            box = text[start : place + 1]
            # An \fbox, or a box with something before its brace, keeps its command.
            return box[len(_BOX) + 1 : -1] if box.startswith(f"{_BOX}{{") else box
    return None


def equal(one: str, other: str) -> bool:
    """Whether two answers are the same string once cleaned, or, if that fails, as they are."""
    try:
        return _clean(one) == _clean(other)
    except (ValueError, IndexError):
        return one == other


def _clean(text: str) -> str:
    """Raises ValueError or IndexError for a text that the clean-up has no rule for."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for command in _DROPPED:
        text = text.replace(command, "")
    if "\\text{ " in text:  # a unit
        text, _unit = text.split("\\text{ ")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = f"0{text}" if text.startswith(".") else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # x = 5
        text = sides[1]
    text = _fractions(_roots(text).replace(" ", ""))
    return _slashed("\\frac{1}{2}" if text == "0.5" else text)


def _roots(text: str) -> str:
    r"""``\sqrt3`` as ``\sqrt{3}``."""
    first, *others = text.split("\\sqrt")
    return first + "".join(
        "\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in others
    )


def _fractions(text: str) -> str:
    r"""``\frac12`` and ``\frac1{2}`` as ``\frac{1}{2}``; all as it is where one is cut short."""
    first, *others = text.split("\\frac")
    parts = [first]
    for part in others:
        if part[0] != "{":
            if len(part) < 2:
                return text
            below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            part = f"{{{part[0]}}}{below}"
        parts.append(part)
    return "\\frac".join(parts)


def _slashed(text: str) -> str:
    """``3/4`` as a fraction; with one slash between anything but whole numbers it fails."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    above, below = map(int, parts)
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
