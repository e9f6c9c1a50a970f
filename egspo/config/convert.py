"""From trees of dicts and lists to the dataclasses of the options; every problem by its path."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """What is wrong with a configuration.

    Args:
        source: where it comes from, the start of the message.
        problems: all of them, at least one.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        if len(self.problems) == 1:
            super().__init__(f"{source}: {self.problems[0]}")
        else:
            listed = "".join(f"\n  - {problem}" for problem in self.problems)
            super().__init__(f"{source}: {len(self.problems)} problems{listed}")


def from_mapping(
    cls: type[T], tree: Mapping[str, Any], source: str, problems: Sequence[str] = ()
) -> T:
    """The dataclass ``cls`` from nested mappings.

    Args:
        cls: one of :mod:`egspo.config`.
        tree: as read from YAML or JSON. A section that is left out in part keeps the defaults of
            its place: ``sft.optimizer`` those of ``SFTConfig``, not of ``OptimizerConfig``.
        source: start of the error message.
        problems: found before, to be reported with the others.

    Raises:
        ConfigError: if there are problems.
    """
    builder = _Builder(cls, problems)
    built: T = builder.convert(tree, cls, "")
    if builder.problems:
        raise ConfigError(source, builder.problems)
    return built


class _Builder:
    """Converts trees to annotated types, collecting every problem on the way."""

    def __init__(self, root: type, problems: Sequence[str]) -> None:
        self.root = root
        self.problems = list(problems)

    def convert(self, value: Any, kind: Any, path: str, default: Any = None) -> Any:
        """``value`` as ``kind``; None after a problem. ``default``: of a section's keys."""
        origin, arguments = get_origin(kind), get_args(kind)
        if kind is Any:
            return value
        if is_dataclass(kind):
            assert isinstance(kind, type)
            return self._section(value, kind, path, default)
        if origin in (Union, types.UnionType):
            (inner,) = (option for option in arguments if option is not types.NoneType)
            return None if value is None else self.convert(value, inner, path, default)
        if origin is dict and isinstance(value, dict):
            if all(isinstance(key, str) for key in value):
                return {k: self.convert(v, arguments[1], f"{path}.{k}") for k, v in value.items()}
        elif origin is list and isinstance(value, list):
            return self._items(value, [arguments[0]] * len(value), path)
        elif origin is tuple and isinstance(value, list) and len(value) == len(arguments):
            return tuple(self._items(value, arguments, path))
        elif origin is Literal:
            if value in arguments:
                return value
        elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):  # an integer that no float reaches
                if math.isfinite(value):
                    return float(value)
        elif kind in (bool, int, str) and type(value) is kind:
            return value
        self.problems.append(f"{path}: expected {expected(kind)}, got {shown(value)}")
        return None

    def _items(self, values: list[Any], kinds: Sequence[Any], path: str) -> list[Any]:
        pairs = enumerate(zip(values, kinds, strict=True))
        return [self.convert(value, kind, f"{path}[{i}]") for i, (value, kind) in pairs]

    def _section(self, value: Any, cls: type, path: str, default: Any) -> Any:
        value = {} if value is None else value  # a section with nothing in it
        if not isinstance(value, Mapping):
            self.problems.append(f"{path}: expected a section (key: value), got {shown(value)}")
            return None
        before = len(self.problems)
        known = {field.name: field for field in fields(cls)}
        hints = field_types(cls)
        for name in value:
            if name not in known:
                self.problems.append(self._unknown(str(name), list(known), path))
        arguments = {}
        for name, field in known.items():
            inner = getattr(default, name) if isinstance(default, cls) else _default(field)
            if name in value:
                arguments[name] = self.convert(value[name], hints[name], joined(path, name), inner)
            elif inner is MISSING:
                self.problems.append(f"{joined(path, name)}: required, and missing")
            else:
                arguments[name] = inner
        if len(self.problems) > before:
            return None
        try:
            return cls(**arguments)
        except ValueError as error:
            message = str(error)
            named = not path or f"{path}." in message
            self.problems.append(message if named else f"{path}: {message}")
            return None

    def _unknown(self, name: str, known: list[str], path: str) -> str:
        near = near_names(name, known)
        candidates = [joined(path, near[0])] if near else []
        if not near:
            everywhere = _dotted_paths(self.root)
            candidates = [other for other in everywhere if other.rpartition(".")[2] == name]
        hint = f"did you mean {' or '.join(candidates)}?" if candidates else ""
        return f"{joined(path, name)}: unknown key; {hint or 'known here: ' + ', '.join(known)}"


def near_names(name: str, known: Sequence[str]) -> list[str]:
    """The one of ``known`` that ``name`` may have been meant to be, if there is one."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.7)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Annotations of a dataclass, resolved."""
    return get_type_hints(cls)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _dotted_paths(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key of the tree under ``cls``."""
    for name, kind in field_types(cls).items():
        path = joined(prefix, name)
        yield path
        for option in (kind, *get_args(kind)):
            if is_dataclass(option):
                assert isinstance(option, type)
                yield from _dotted_paths(option, path)


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def plain(value: Any) -> Any:
    """What an option holds as dicts, lists and scalars."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def expected(kind: Any) -> str:
    """A type in the words of who writes YAML."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is types.NoneType else expected(a) for a in arguments)
    if is_dataclass(kind):
        return "a section"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"a list of {len(arguments)} items, each {expected(arguments[0])}"
    return _WORDS[origin or kind]


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    list: "a list",
    dict: "a section (key: value) with strings as keys",
}


def shown(value: Any) -> str:
    names: dict[type, str] = {str: "the string ", dict: "the section ", list: "the list "}
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{names.get(type(value), '')}{text}"
