"""Wrong answers that look like the right one.

The candidates of a value are a random walk through values of its kind, in small steps, with the
value at a random place of it: neither which is in the middle nor which is the simplest tells one
from the others, only knowing the answer does.
"""

from __future__ import annotations

import builtins
import math
import random
import string
from typing import Any

COUNT = 16
"""Candidates of a value, itself included: the odds of a guess."""
_MAX_TEXT = 4096  # characters of all candidates of a longer value are not worth their weight
_FEW = 4
_CLASSES = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
_EXCEPTIONS = (
    *(ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, AttributeError, OSError),
    *(RuntimeError, NameError, EOFError, OverflowError, StopIteration, ImportError, MemoryError),
)


def candidates(value: Any, rng: random.Random, *, gap: float = 0.0) -> tuple[list[Any], int] | None:
    """Values in random order, pairwise different, and the place of ``value`` among them.

    Args:
        value: what :func:`ast.literal_eval` may give.
        gap: numbers differ by more than this.

    Returns:
        None where no others of its kind are known (NaN) or they would be too long.
    """
    if value is None or value is True or value is False:
        found: list[Any] = [None, True, False] if value is None else [True, False]
    else:
        size = len(repr(value))
        if size > _MAX_TEXT or value != value:
            return None
        found = _walk(value, rng, COUNT if COUNT * size <= _MAX_TEXT else _FEW, gap)
    if len(found) < 2:
        return None
    rng.shuffle(found)
    return found, next(i for i, v in enumerate(found) if type(v) is type(value) and v == value)


def exceptions(kind: type[BaseException], rng: random.Random) -> tuple[list[str], int]:
    """Names of exceptions of which none is derived from another, and the place of ``kind``."""
    apart = [k for k in _EXCEPTIONS if not issubclass(k, kind) and not issubclass(kind, k)]
    names = [kind.__name__, *(k.__name__ for k in rng.sample(apart, 5))]
    rng.shuffle(names)
    return names, names.index(kind.__name__)


def builtin_exception(name: str) -> type[BaseException] | None:
    """The exception of this name, if others can be told from it: not ``Exception`` itself."""
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return None
    return None if kind in (Exception, AssertionError) else kind


def _walk(value: Any, rng: random.Random, count: int, gap: float) -> list[Any]:
    found = [value]
    first = last = value
    before = rng.randrange(count)  # steps in front of the value; the others follow it
    for _ in range(8 * count):
        if len(found) == count:
            break
        backwards = before > 0
        step = _step(first if backwards else last, rng, gap)
        if any(_alike(step, other, gap) for other in found):
            continue
        found.append(step)
        if backwards:
            first, before = step, before - 1
        else:
            last = step
    return found


def _alike(a: Any, b: Any, gap: float) -> bool:
    """Whether a program could mean both: equal, or as near as a tolerance allows."""
    numbers = (int, float, complex)
    if isinstance(a, numbers) and isinstance(b, numbers):
        return bool(abs(a - b) <= 2 * gap + 1e-3 * abs(b) * isinstance(b, float)) or a == b
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        return all(_alike(x, y, gap) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return all(_alike(a[key], b[key], gap) for key in a)
    return bool(a == b)


def _step(value: Any, rng: random.Random, gap: float) -> Any:
    """A value of the same kind, one change away."""
    if isinstance(value, bool):
        return not value
    if value is None:
        return rng.choice([0, False, ""])
    if isinstance(value, int):
        reach = max(3, abs(value) // 4, math.ceil(4 * gap))
        return value + rng.choice([-1, 1]) * rng.randint(1, reach)
    if isinstance(value, float):
        return _float_step(value, rng, gap)
    if isinstance(value, complex):
        return complex(_float_step(value.real, rng, gap), value.imag)
    if isinstance(value, str):
        return _text_step(value, rng)
    if isinstance(value, bytes):
        return bytes(value[:-1] + bytes([rng.randrange(32, 127)])) if value else b"a"
    if isinstance(value, dict):
        return _dict_step(value, rng, gap)
    if isinstance(value, set | frozenset):
        return type(value)(_items_step(sorted(value, key=repr), rng, gap))
    return type(value)(_items_step(list(value), rng, gap))


def _float_step(value: float, rng: random.Random, gap: float) -> float:
    if math.isinf(value):
        return rng.choice([-value, 0.0, 1.0])
    digits = len(repr(value).partition(".")[2]) if "e" not in repr(value) else 17
    reach = max(abs(value), 10.0**-digits, 4 * gap)
    step = round(value + rng.choice([-1, 1]) * rng.uniform(0.05, 1.0) * reach, digits)
    return float(step)


def _text_step(text: str, rng: random.Random) -> str:
    if not text:
        return rng.choice(string.ascii_lowercase)
    place = rng.randrange(len(text))
    kind = next((c for c in _CLASSES if text[place] in c), string.ascii_lowercase)
    way = rng.randrange(4)
    if way == 0 and len(text) > 1:
        return text[:place] + text[place + 1 :]
    if way == 1:
        return text[:place] + rng.choice(kind) + text[place:]
    if way == 2 and place:
        return text[: place - 1] + text[place] + text[place - 1] + text[place + 1 :]
    return text[:place] + rng.choice(kind) + text[place + 1 :]


def _items_step(items: list[Any], rng: random.Random, gap: float) -> list[Any]:
    if not items:
        return [rng.randint(0, 9)]
    place = rng.randrange(len(items))
    way = rng.randrange(6)
    if way == 0 and len(items) > 1:
        del items[place]
    elif way == 1:
        items.insert(place, _step(items[place], rng, gap))
    elif way == 2 and place:
        items[place - 1], items[place] = items[place], items[place - 1]
    else:
        items[place] = _step(items[place], rng, gap)
    return items


def _dict_step(items: dict[Any, Any], rng: random.Random, gap: float) -> dict[Any, Any]:
    if not items:
        return {rng.choice(string.ascii_lowercase): rng.randint(0, 9)}
    key = rng.choice(sorted(items, key=repr))
    way = rng.randrange(4)
    if way == 0 and len(items) > 1:
        return {k: v for k, v in items.items() if k != key}
    if way == 1:
        renamed = _step(key, rng, gap)
        return {(renamed if k == key else k): v for k, v in items.items()}
    return {k: (_step(v, rng, gap) if k == key else v) for k, v in items.items()}
