"""Values in messages: plain data by value, everything else by reference.

A plain value (None, numbers, strings, the standard containers, decimals, fractions, times) is
rebuilt on the other side as the standard type that it is, exactly: no object of the program's, with
an ``__eq__`` of its own, reaches the tests under the name of a list. Instances of subclasses, and
of every other class, are references.

In JSON: None, booleans, strings, floats and small integers stand for themselves, anything else is
a list that begins with its kind.
"""

from __future__ import annotations

import collections
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

_SMALL = 2**53
_ITEMS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_PAIRS = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": collections.Counter,
}
_TYPES = {
    t.__name__: t
    for t in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, object, range)
} | {t.__name__: t for t in (set, str, tuple, type(None))}


class Codec:
    """Encodes and decodes plain values; subclasses do references."""

    def encode(self, value: Any) -> Any:
        """Raises: TypeError, RecursionError: it cannot be sent."""
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if kind is int:
            return value if -_SMALL < value < _SMALL else ["int", hex(value)]
        if kind.__name__ in _ITEMS and kind is _ITEMS[kind.__name__]:
            return [kind.__name__, *map(self.encode, value)]
        if kind.__name__ in _PAIRS and kind is _PAIRS[kind.__name__]:
            return [kind.__name__, *self._pairs(value.items())]
        if kind is collections.defaultdict:
            factory = value.default_factory
            plain = factory if factory in _TYPES.values() else None
            return ["defaultdict", self.encode(plain), *self._pairs(value.items())]
        if kind is collections.deque:
            return ["deque", value.maxlen, *map(self.encode, value)]
        if kind in (bytes, bytearray):
            return [kind.__name__, value.hex()]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is range:
            return ["range", *map(self.encode, (value.start, value.stop, value.step))]
        if kind is type and value in _TYPES.values():
            return ["type", value.__name__]
        other = _encode_other(value)
        return self.encode_reference(value) if other is None else other

    def _pairs(self, items: Iterable[tuple[Any, Any]]) -> list[Any]:
        return [[self.encode(key), self.encode(value)] for key, value in items]

    def decode(self, wire: Any) -> Any:
        """Raises: Exception of any kind, if ``wire`` is not an encoded value."""
        if not isinstance(wire, list):
            if wire is None or isinstance(wire, bool | int | float | str):
                return wire
            raise ValueError(f"{type(wire).__name__} is not an encoded value")
        kind, *parts = wire
        if kind in _ITEMS:
            return _ITEMS[kind](map(self.decode, parts))
        if kind in _PAIRS:
            pairs = {self.decode(key): self.decode(value) for key, value in parts}
            return pairs if kind == "dict" else _PAIRS[kind](pairs)
        if kind == "int":
            return int(parts[0], 16)
        if kind == "defaultdict":
            factory, *items = parts
            pairs = {self.decode(key): self.decode(value) for key, value in items}
            return collections.defaultdict(self.decode(factory), pairs)
        if kind == "deque":
            return collections.deque(map(self.decode, parts[1:]), parts[0])
        if kind in ("bytes", "bytearray"):
            return (bytes if kind == "bytes" else bytearray).fromhex(parts[0])
        if kind == "complex":
            return complex(*parts)
        if kind == "range":
            return range(*map(self.decode, parts))
        if kind == "type":
            return _TYPES[parts[0]]
        if kind in _OTHERS:
            return _OTHERS[kind](parts)
        return self.decode_reference(kind, parts)

    def encode_reference(self, value: Any) -> list[Any]:
        raise NotImplementedError

    def decode_reference(self, kind: str, parts: list[Any]) -> Any:
        raise NotImplementedError


def _encode_other(value: Any) -> list[Any] | None:
    """Numbers and times of modules that are imported only where they are used."""
    kind = type(value)
    if kind.__module__ == "decimal" and kind is sys.modules["decimal"].Decimal:
        return ["Decimal", str(value)]
    if kind.__module__ == "fractions" and kind is sys.modules["fractions"].Fraction:
        return ["Fraction", hex(value.numerator), hex(value.denominator)]
    if kind.__module__ == "datetime" and kind is getattr(sys.modules["datetime"], kind.__name__):
        if kind.__name__ == "timedelta":
            return ["timedelta", value.days, value.seconds, value.microseconds]
        if kind.__name__ in ("date", "time", "datetime"):
            return [kind.__name__, value.isoformat()]
    return None


def _decimal(parts: list[Any]) -> Any:
    import decimal

    return decimal.Decimal(parts[0])


def _fraction(parts: list[Any]) -> Any:
    import fractions

    return fractions.Fraction(*(int(part, 16) for part in parts))


def _time(name: str) -> Callable[[list[Any]], Any]:
    def build(parts: list[Any]) -> Any:
        import datetime

        kind = getattr(datetime, name)
        return kind(*parts) if name == "timedelta" else kind.fromisoformat(*parts)

    return build


_OTHERS = {
    "Decimal": _decimal,
    "Fraction": _fraction,
    **{name: _time(name) for name in ("date", "time", "datetime", "timedelta")},
}


def restore(old: Any, new: Any) -> None:
    """Make the mutable value ``old`` what it became on the other side, in place."""
    if isinstance(old, list) and isinstance(new, list):
        for index in range(min(len(old), len(new))):
            if type(old[index]) is type(new[index]) and _mutable(old[index]):
                restore(old[index], new[index])
                new[index] = old[index]
        old[:] = new
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() & new.keys():
            if type(old[key]) is type(new[key]) and _mutable(old[key]):
                restore(old[key], new[key])
                new[key] = old[key]
        old.clear()
        old.update(new)
    elif isinstance(old, set) and isinstance(new, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray) and isinstance(new, bytearray):
        old[:] = new
    elif isinstance(old, collections.deque) and isinstance(new, collections.deque):
        old.clear()
        old.extend(new)


def _mutable(value: Any) -> bool:
    return isinstance(value, list | dict | set | bytearray | collections.deque)
