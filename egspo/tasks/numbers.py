"""Numbers as people and models write them."""

from __future__ import annotations

import re
from fractions import Fraction

_CURRENCY = r"(?:\\?\$|[€£¥₹])"
# A sign, a currency, digits: $-5, -$5, - 5; commas between thousands, `{,}` and thin spaces too.
_NUMBER = re.compile(
    rf"(?P<opened>\$)?\s*(?P<sign>[-+]?)\s*(?:{_CURRENCY}\s*)?(?P<inner>[-+]?)"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{0,64})(?:\.(?P<part>[0-9]{0,64}))?"
    r"\s*(?:\\?%|[€£¥₹])?\s*\$?\s*\.?"
)
_ANY_NUMBER = re.compile(
    rf"(?:(?<![\w).])[-+])?(?:{_CURRENCY}-?)?[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]+)?"
)
_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"))
_GAP_IN_NUMBER = re.compile(
    r"(?<=[0-9])(?:\{,\}|\\[,!;: ]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))"
)


def number(text: str | None) -> Fraction | None:
    """The number that ``text`` is, or None where it is something else as well.

    A currency sign, a percent sign, a full stop at the end, and what separates thousands (commas,
    ``{,}``, thin spaces) do not count; every minus sign is one: ``$1,250.00`` is 1250 and ``-$5``
    is -5.
    """
    if text is None or len(text) > 100:
        return None
    return _value(_plain(text))


def _plain(text: str) -> str:
    """With ASCII minus signs, and commas for what else separates thousands."""
    return _GAP_IN_NUMBER.sub(",", text.translate(_MINUS)).strip()


def _value(plain: str) -> Fraction | None:
    found = _NUMBER.fullmatch(plain)
    if found is None or (found["sign"] and found["inner"]):
        return None
    whole, part = found["whole"].replace(",", ""), found["part"] or ""
    if not whole and not part:
        return None
    value = Fraction(f"{whole or 0}.{part or 0}")
    return -value if "-" in (found["sign"], found["inner"]) else value


def last_number(text: str | None) -> Fraction | None:
    """The number that ``text`` is, or else the last one in it; None without one."""
    whole = number(text)
    if whole is not None or text is None or len(text) > 1000:
        return whole
    found = _ANY_NUMBER.findall(_plain(text))
    return number(found[-1]) if found else None
