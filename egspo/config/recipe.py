"""Recipes: from YAML and ``key=value`` overrides to a checked :class:`TrainConfig`, and back.

Scalars are read by YAML 1.2's rules: ``1e-3`` is a number, ``no`` and ``off`` are strings. A key
given twice is refused. All problems of a recipe are reported together, each with its dotted path.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from egspo.config.convert import ConfigError, from_mapping, joined, plain, shown
from egspo.config.options.run import TrainConfig
from egspo.config.presets import PRESETS, preset_values
from egspo.config.protocol import fill_protocol
from egspo.config.yaml_text import dump_yaml, load_yaml, yaml_problem
from egspo.files import replacing

TASK_COPY = "task.py"
"""Copy of ``task.file`` in the folder of a run."""


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
        path = joined(prefix, str(name))
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
    text = dump_yaml(config_to_dict(config))
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
        raise ConfigError(str(path), [f"not valid YAML: {yaml_problem(error)}"]) from error
    if tree is None:
        raise ConfigError(str(path), ["the file is empty"])
    if not isinstance(tree, dict):
        raise ConfigError(str(path), [f"expected sections (key: value), got {shown(tree)}"])
    return tree


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (no folder {path.parent})"
    names = [file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, sorted(names), n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


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
        problems.append(f"override {text!r}: the value is not valid YAML: {yaml_problem(error)}")
        return path
    section = tree
    for depth, name in enumerate(names[:-1]):
        below = section.get(name)
        if below is None:
            below = section[name] = {}
        elif not isinstance(below, dict):
            parent = ".".join(names[: depth + 1])
            problems.append(f"override {text!r}: {parent} is {shown(below)}, not a section")
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
    for section_name, values in preset_values(name, tree).items():
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
