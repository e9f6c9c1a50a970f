"""Recipes: from YAML and ``key=value`` overrides to a checked :class:`TrainConfig`, and back.

Scalars are read by YAML 1.2's rules: ``1e-3`` is a number, ``no`` and ``off`` are strings. A key
given twice is refused. All problems of a recipe are reported together, each with its dotted path.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from egspo.config.options.run import TrainConfig
from egspo.config.presets import PRESETS
from egspo.config.protocol import fill_protocol
from egspo.files import replacing

T = TypeVar("T")

TASK_COPY = "task.py"
"""Copy of ``task.file`` in the folder of a run."""


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


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of the recipe at ``path``.

    Overrides win over the recipe, and both over ``algorithm.preset`` and ``protocol``, which only
    fill what they leave out; but ``protocol`` as an override wins over the recipe.

    Args:
        path: YAML file.
        overrides: ``dotted.path=value``, the value in YAML; the last one of a path counts.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: listing everything that is wrong: syntax, duplicate or unknown keys, types,
            values, or a preset chosen by an override that the recipe's own keys contradict.
    """
    return load_with_origins(path, overrides)[0]


def load_with_origins(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[TrainConfig, dict[str, str]]:
    """As :func:`load_config`, and what values came from.

    Returns:
        The configuration, and by dotted path ``recipe``, ``preset NAME``, ``protocol NAME`` or
        ``override``; paths below one of these share its origin, and what is left out is a default.
    """
    path = Path(path)
    tree = read_yaml(path)
    origins = dict.fromkeys(_leaves(tree), "recipe")
    recipe_preset = _preset(tree)
    problems: list[str] = []
    overridden = {_override(tree, text, problems) for text in overrides}
    origins |= dict.fromkeys(overridden, "override")
    forced = "protocol" in overridden
    published = fill_protocol(tree, overridden, forced=forced, problems=problems)
    origins |= dict.fromkeys(published, f"protocol {tree.get('protocol')}")
    filled = _fill_preset(tree, None if recipe_preset == _preset(tree) else overridden, problems)
    origins |= dict.fromkeys(filled, f"preset {_preset(tree)}")
    return from_mapping(TrainConfig, tree, str(path), problems), origins


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all that is no section."""
    for name, value in tree.items():
        path = _join(prefix, str(name))
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The tree of ``dotted.path=value`` pairs alone; raises ConfigError if one is malformed."""
    tree: dict[str, Any] = {}
    problems: list[str] = []
    for text in overrides:
        _override(tree, text, problems)
    if problems:
        raise ConfigError("command line", problems)
    return tree


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


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """``config`` as nested dicts and lists, ready for YAML or JSON."""
    tree: dict[str, Any] = plain(config)
    return tree


def save_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Write the effective configuration, which loads back as an equal one.

    Beside it a copy of ``task.file``, if there is one, as :data:`TASK_COPY`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if config.task.file is not None:
        _write(path.with_name(TASK_COPY), Path(config.task.file).expanduser().read_bytes())
    # In ASCII: PyYAML writes some line breaks of Unicode as they are, and reads them as others.
    text = yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False)
    _write(path, text.encode())


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def task_content(config: TrainConfig, run: Path) -> tuple[bytes | None, bytes | None]:
    """What the task files say of ``config`` and of the run in the folder ``run``; None for none.

    Raises:
        FileNotFoundError: there is no file ``task.file``.
    """
    file, copy = config.task.file, run / TASK_COPY
    return (
        None if file is None else Path(file).expanduser().read_bytes(),
        copy.read_bytes() if copy.is_file() else None,
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema for plain scalars, and no duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # starts without YAML 1.1's

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
# Of a recipe, generously: its own tree is four levels deep, and its options are some hundred.
_MOST_LEVELS, _MOST_VALUES = 64, 100_000
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
        _check_size(text)
        return yaml.load(text, Loader=_Loader)
    except (ValueError, OverflowError, RecursionError) as error:  # dates and numbers that are none
        raise yaml.YAMLError(str(error)) from error


def _check_size(text: str) -> None:
    """Follow the events of the parser, before anything is built of them."""
    sizes: dict[str, int] = {}  # of complete anchors, with all that their aliases stand for
    open_nodes: list[list[Any]] = [[None, 0]]  # anchor and size so far
    for event in yaml.parse(text, Loader=_Loader):
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


def _refused(event: yaml.Event, problem: str) -> yaml.YAMLError:
    mark: Any = event.start_mark
    return yaml.YAMLError(f"{problem} (line {mark.line + 1}, column {mark.column + 1})")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; errors as :func:`load_config`."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(str(path), ["a recipe is a YAML file, this is a folder"])
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}{_near_file(path)}")
    try:
        tree = load_yaml(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"not a text file in UTF-8: {error}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"not valid YAML: {_yaml_problem(error)}"]) from error
    if tree is None:
        raise ConfigError(str(path), ["the file is empty"])
    if not isinstance(tree, dict):
        raise ConfigError(str(path), [f"expected sections (key: value), got {_shown(tree)}"])
    return tree


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (no folder {path.parent})"
    names = [file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, sorted(names), n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return str(error)


def _override(tree: dict[str, Any], text: str, problems: list[str]) -> str:
    """Apply ``dotted.path=value`` to ``tree``; returns the path."""
    path, equals, value_text = text.partition("=")
    names = path.split(".")
    if not equals or not all(names):
        problems.append(f"override {text!r}: expected dotted.path=value")
        return path
    try:
        value = load_yaml(value_text)
    except yaml.YAMLError as error:
        problems.append(f"override {text!r}: the value is not valid YAML: {_yaml_problem(error)}")
        return path
    section = tree
    for depth, name in enumerate(names[:-1]):
        below = section.get(name)
        if below is None:
            below = section[name] = {}
        elif not isinstance(below, dict):
            parent = ".".join(names[: depth + 1])
            problems.append(f"override {text!r}: {parent} is {_shown(below)}, not a section")
            return path
        section = below
    section[names[-1]] = value
    return path


def _preset(tree: Mapping[str, Any]) -> Any:
    algorithm = tree.get("algorithm")
    return algorithm.get("preset") if isinstance(algorithm, dict) else None


def _fill_preset(
    tree: dict[str, Any], overridden: set[str] | None, problems: list[str]
) -> set[str]:
    """Add the preset's values that ``tree`` leaves out; returns their paths.

    Args:
        tree: recipe and overrides.
        overridden: paths of the overrides, if one of them changed the recipe's preset. Then it is
            a problem, not a choice, if keys of the recipe keep the preset from taking effect.
        problems: appended to.
    """
    name = _preset(tree)
    if not isinstance(name, str) or name not in PRESETS:
        return set()  # None, or refused with the other values of a wrong type
    filled = set()
    for section_name, values in PRESETS[name].items():
        if tree.get(section_name) is None:
            tree[section_name] = {}
        section = tree[section_name]
        if not isinstance(section, dict):
            continue
        for key, value in values.items():
            path = f"{section_name}.{key}"
            if key not in section:
                filled.add(path)
            current = section.setdefault(key, value)
            if overridden is not None and path not in overridden and current != value:
                problems.append(
                    f"algorithm.preset={name} was asked for, which means {path}={value}, but the "
                    f"recipe itself sets {current}: add the override {path}={value} to follow the "
                    f"preset, or {path}={current} to keep the recipe's"
                )
    return filled


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
            if math.isfinite(value):
                return float(value)
        elif kind in (bool, int, str) and type(value) is kind:
            return value
        self.problems.append(f"{path}: expected {expected(kind)}, got {_shown(value)}")
        return None

    def _items(self, values: list[Any], kinds: Sequence[Any], path: str) -> list[Any]:
        pairs = enumerate(zip(values, kinds, strict=True))
        return [self.convert(value, kind, f"{path}[{i}]") for i, (value, kind) in pairs]

    def _section(self, value: Any, cls: type, path: str, default: Any) -> Any:
        value = {} if value is None else value  # a section with nothing in it
        if not isinstance(value, Mapping):
            self.problems.append(f"{path}: expected a section (key: value), got {_shown(value)}")
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
                arguments[name] = self.convert(value[name], hints[name], _join(path, name), inner)
            elif inner is MISSING:
                self.problems.append(f"{_join(path, name)}: required, and missing")
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
        candidates = [_join(path, near[0])] if near else []
        if not near:
            everywhere = _dotted_paths(self.root)
            candidates = [other for other in everywhere if other.rpartition(".")[2] == name]
        hint = f"did you mean {' or '.join(candidates)}?" if candidates else ""
        return f"{_join(path, name)}: unknown key; {hint or 'known here: ' + ', '.join(known)}"


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
        path = _join(prefix, name)
        yield path
        for option in (kind, *get_args(kind)):
            if is_dataclass(option):
                assert isinstance(option, type)
                yield from _dotted_paths(option, path)


def _join(path: str, name: str) -> str:
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


def _shown(value: Any) -> str:
    names: dict[type, str] = {str: "the string ", dict: "the section ", list: "the list "}
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{names.get(type(value), '')}{text}"
