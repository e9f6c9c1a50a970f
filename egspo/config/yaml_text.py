"""YAML as recipes have it: scalars of YAML 1.2, no key twice, and nothing that explodes."""

from __future__ import annotations

import re
from typing import Any

import yaml

# Of a recipe, generously: its own tree is four levels deep, and its options are some hundred.
_MOST_LEVELS, _MOST_VALUES = 64, 100_000


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema for plain scalars, no duplicate keys, and a size that is bounded."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # starts without YAML 1.1's

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[str, int] = {}  # of complete anchors, with what their aliases stand for
        self._open: list[list[Any]] = [[None, 0]]  # anchor and size so far

    def get_event(self) -> yaml.Event:
        """The next event of the parser, from which nothing has been built yet."""
        event: yaml.Event = super().get_event()  # type: ignore[no-untyped-call]
        self._check_size(event)
        return event

    def _check_size(self, event: yaml.Event) -> None:
        sizes, open_nodes = self._sizes, self._open
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise _refused(event, f"the alias *{event.anchor} refers to what it is in")
            open_nodes[-1][1] += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            open_nodes[-1][1] += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
            if len(open_nodes) > _MOST_LEVELS:
                raise _refused(event, f"nested more than {_MOST_LEVELS - 1} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            open_nodes[-1][1] += size
            if anchor is not None:
                sizes[anchor] = size
        if open_nodes[-1][1] > _MOST_VALUES:
            raise _refused(event, f"more than {_MOST_VALUES} values, with those of its aliases")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that PyYAML or :class:`_Loader` would read as something else."""


_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


_SCALARS = {
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    "float": (_FLOAT, "-+.0123456789"),
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "merge": (re.compile(r"<<$"), "<"),
}


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, list(_first))


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """What ``text`` says in YAML.

    Raises:
        yaml.YAMLError: it is not valid, an alias refers to what it is in, or it is nested or grows
            by its aliases beyond what any recipe needs.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, OverflowError, RecursionError) as error:  # dates and numbers that are none
        raise yaml.YAMLError(str(error)) from error


def _refused(event: yaml.Event, problem: str) -> yaml.YAMLError:
    mark: Any = event.start_mark
    return yaml.YAMLError(f"{problem} (line {mark.line + 1}, column {mark.column + 1})")


def yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return str(error)


def dump_yaml(tree: Any) -> str:
    """``tree`` as text that :func:`load_yaml` reads as the same."""
    # In ASCII: PyYAML writes some line breaks of Unicode as they are, and reads them as others.
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
    return text
