r"""How numbers are written in LaTeX, and what of it is decided without algebra.

* Two plain numbers are compared exactly: ``0.5`` is ``\frac{1}{2}``, ``0.333`` is not
  ``\frac{1}{3}``, ``0.0000001`` is not ``0.0000002``.
* A number with a base is equal to the same digits with the same base, and to nothing else.
* A fraction of whole numbers has to be in lowest terms, and a binomial to be computed: the
  question often holds what is not.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from egspo.tasks.numbers import number

EQUAL, UNEQUAL = "equal", "not equal"

_BASE = re.compile(
    r"(?<![\w.}])\(?(?:\\(?:text|mathrm)\{)?([0-9][0-9A-Fa-f]*)\}?\)?\s*_\s*"
    r"(?:\{\s*(?:\\(?:text|mathrm)\{)?([0-9]{1,2})\}?\s*\}|([0-9]))"
)
_WHOLE = r"([0-9]{1,30})"
_FRACTIONS = (
    re.compile(rf"\\[dt]?frac\s*\{{\s*-?\s*{_WHOLE}\s*\}}\s*\{{\s*{_WHOLE}\s*\}}"),
    re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])"),
    re.compile(rf"(?<![0-9.)}}\]a-zA-Z_^]){_WHOLE}\s*/\s*{_WHOLE}(?![0-9.a-zA-Z(\\^!])"),
)
_ONE_FRACTION = re.compile(
    rf"([-+]?)\s*(?:{_WHOLE}(?:\s+(?=[0-9])|\s*(?=\\)))?"
    rf"(?:\\[dt]?frac\s*\{{\s*(-?)\s*{_WHOLE}\s*\}}\s*\{{\s*{_WHOLE}\s*\}}"
    rf"|\\[dt]?frac\s*([0-9])\s*([0-9])|{_WHOLE}\s*/\s*{_WHOLE})"
)
_SCIENTIFIC = re.compile(
    r"(?:([-+]?[0-9]{1,30}(?:\.[0-9]{1,30})?)\s*(?:\\times|\\cdot|\*|\u00d7)\s*)?"
    r"10\s*\^\s*(?:\{\s*(-?[0-9]{1,3})\s*\}|([0-9]))"
)


def normalised(text: str) -> str:
    """Without dollars around it and a full stop, and with bases that algebra cannot overlook."""
    text = _without_stop(text)
    if len(text) > 1 and text[0] == text[-1] == "$" and not text.endswith("\\$"):
        text = _without_stop(text[1:-1])
    return _BASE.sub(_base_name, text)


def _without_stop(text: str) -> str:
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def _base_name(match: re.Match[str]) -> str:
    digits = match[1].lstrip("0").lower() or "0"
    return rf"\text{{base{match[2] or match[3]}numeral{digits}}}"


def plain_number(text: str) -> Fraction | None:
    """The number that ``text`` is: whole, decimal, a fraction, mixed, or times a power of ten.

    None where it is anything else, such as a percentage.
    """
    if "%" in text:
        return None
    text = text.replace("\\!", "").strip()
    value = number(text)
    if value is not None:
        return value
    if power := _SCIENTIFIC.fullmatch(text):
        return Fraction(power[1] or 1) * Fraction(10) ** int(power[2] or power[3])
    found = _ONE_FRACTION.fullmatch(text)
    if found is None:
        return None
    sign, whole, inner = found[1], int(found[2] or 0), found[3]
    above, below = next(
        (int(found[i]), int(found[i + 1])) for i in (4, 6, 8) if found[i] is not None
    )
    if below == 0 or (inner and (sign or whole)):
        return None
    value = whole + Fraction(above, below)
    return -value if "-" in (sign, inner) else value


def unreduced(text: str) -> str | None:
    """The first fraction of whole numbers that is not in lowest terms, or a binomial; or None."""
    if "binom" in text:
        return "a binomial that is not computed"
    for pattern in _FRACTIONS:
        for found in pattern.finditer(text):
            above, below = int(found[1]), int(found[2])
            if below == 1 or math.gcd(above, below) > 1:
                return f"{found[0]} is not in lowest terms"
    return None


def decide(gold: str, answer: str) -> str | None:
    """A verdict where no algebra is needed, None otherwise.

    :data:`EQUAL`, :data:`UNEQUAL`, or why the answer is not taken. Both are :func:`normalised`.
    """
    if "".join(gold.split()) == "".join(answer.split()):
        return EQUAL
    numbers = plain_number(gold), plain_number(answer)
    if None not in numbers and numbers[0] != numbers[1]:
        return UNEQUAL
    reason = unreduced(answer)
    if reason is not None and unreduced(gold) is None:
        return reason
    return EQUAL if None not in numbers else None
