"""Chains of additions and subtractions, worked out line by line.

Most tokens of an answer are copied, from the problem or from the line before; the digits of each
result are decided. What to train on such a trajectory is a choice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Set
from dataclasses import dataclass

_LINE = re.compile(r"\s*(\d{1,9})\s*([+-])\s*(\d{1,9})\s*=\s*(-?\d{1,9})\s*")
_MAX_TEXT = 4000
LARGEST = 99
"""Numbers and running results lie between 0 and at most this."""


@dataclass(frozen=True)
class Chain:
    """A number, and what is added to it or taken away, one after the other."""

    start: int
    changes: tuple[int, ...]
    """Negative where taken away."""
    digits: int = 2
    """With which numbers are written."""

    @property
    def key(self) -> str:
        """As the prompt has it: ``23+18-07``."""
        return self._number(self.start) + "".join(map(self._signed, self.changes))

    @property
    def form(self) -> str:
        """What is to be filled in: ``23+18=__;__-07=__``, the results and who goes on from them
        left open. A character stands where the solution has it."""
        blank = "_" * self.digits
        before = [self._number(self.start), *[blank] * (len(self.changes) - 1)]
        pairs = zip(before, self.changes, strict=True)
        return ";".join(f"{first}{self._signed(change)}={blank}" for first, change in pairs)

    @property
    def results(self) -> list[int]:
        """After each change."""
        found, value = [], self.start
        for change in self.changes:
            value += change
            found.append(value)
        return found

    def solution(self, apply: Callable[[int, int], int] = int.__add__) -> str:
        """``23+18=41;41-07=34``: the lines, by ``apply`` to the result so far and the change."""
        lines, value = [], self.start
        for change in self.changes:
            result = apply(value, change)
            lines.append(f"{self._number(value)}{self._signed(change)}={self._number(result)}")
            value = result
        return ";".join(lines)

    def careless_solution(self) -> str:
        """How a careless solver answers: as :func:`one_off` does with one digit, and as
        :func:`without_carry` with two."""
        return self.solution(one_off if self.digits == 1 else without_carry)

    def _number(self, value: int) -> str:
        return f"{value:0{self.digits}d}"

    def _signed(self, change: int) -> str:
        return f"{'+' if change >= 0 else '-'}{self._number(abs(change))}"


def one_off(value: int, change: int) -> int:
    """By counting from the number itself: 3+5 is 3, 4, 5, 6, 7. Behind 9 comes 0, before 0 is 9."""
    return (value + change - (1 if change >= 0 else -1)) % 10


def without_carry(value: int, change: int) -> int:
    """Each digit by itself, and nothing carried or borrowed."""
    tens, units = divmod(value, 10)
    more_tens, more_units = divmod(abs(change), 10)
    sign = 1 if change >= 0 else -1
    return (tens + sign * more_tens) % 10 * 10 + (units + sign * more_units) % 10


def right_lines(text: str, chain: Chain) -> tuple[int, int]:
    """How many lines of a worked answer are right, and how many there should be.

    A line is right where it goes on from the result of the line before, makes the change that is
    asked for there and states its true result. A slip costs its own line: the next may be right
    again. Lines stand between ``;`` or line breaks. A line too many counts as one that should not
    be there: it makes the second number larger.
    """
    lines = [part for part in re.split(r"[;\n]", text[:_MAX_TEXT]) if part.strip()]
    right, value = 0, chain.start
    for change, line in zip(chain.changes, lines, strict=False):
        match = _LINE.fullmatch(line)
        if match is None:
            break  # nothing to go on from
        before, sign, amount, after = match.groups()
        made = int(amount) if sign == "+" else -int(amount)
        right += int(before) == value and made == change and int(after) == value + change
        value = int(after)
    return right, max(len(lines), len(chain.changes))


def make_chains(
    changes: int, count: int, *, largest: int, taken: Set[str], seed: int, name: str
) -> list[Chain]:
    """``count`` distinct chains with so many ``changes``, none of them ``taken``, whose running
    results lie between 0 and ``largest``.

    Raises:
        ValueError: that would be more than half of all that there are.
    """
    if count + len(taken) > (possible := (largest + 1) * largest**changes) // 2:
        raise ValueError(f"{count} more chains of {changes} changes are too many of {possible}")
    rng = random.Random(f"{seed}-arithmetic-{name}")
    found: dict[str, Chain] = {}
    while len(found) < count:
        chain = _drawn(changes, largest, rng)
        if chain.key not in taken:
            found.setdefault(chain.key, chain)
    return list(found.values())


def _drawn(changes: int, largest: int, rng: random.Random) -> Chain:
    value = start = rng.randint(0, largest)
    drawn = []
    for _ in range(changes):
        result = rng.choice([other for other in range(largest + 1) if other != value])
        drawn.append(result - value)
        value = result
    return Chain(start, tuple(drawn), len(str(largest)))
