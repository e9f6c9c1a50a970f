"""Options in words: all that there are, and where the values of a run came from."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_args

import yaml

from egspo.config.convert import expected, field_types, near_names, plain
from egspo.config.options.run import TrainConfig
from egspo.config.presets import PRESETS, SameAs
from egspo.config.recipe import config_to_dict


@dataclass(frozen=True)
class Option:
    """One key of a recipe."""

    path: str
    """With dots between the sections."""
    kind: str
    """What may be given, in words."""
    default: str
    """In YAML; empty where one must be given."""
    text: str


@dataclass(frozen=True)
class Section:
    """The options of one dataclass."""

    path: str
    """Empty for the top of the tree."""
    text: str
    options: list[Option]


def sections() -> list[Section]:
    """All options of a recipe, section by section, the top of the tree first."""
    return list(_sections(TrainConfig, "", None))


def chosen_sections(name: str | None) -> list[Section]:
    """Those of the section ``name`` and below it, or all.

    Raises:
        ValueError: there is no such section.
    """
    found = sections()
    if name is None:
        return found
    chosen = [s for s in found if s.path == name or s.path.startswith(f"{name}.")]
    if not chosen:
        known = [section.path for section in found if section.path]
        near = near_names(name, known)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"no section {name!r}; {hint}")
    return chosen


def to_markdown() -> str:
    """The page ``docs/options.md``."""
    lines = [
        "# Options",
        "",
        "Every key of a recipe: what may be given, its default, what it does. `egspo options`"
        " prints the same, `egspo train RECIPE --print-config` the values of a run and what each"
        " came from. This page is made from the code (`egspo options --markdown`).",
    ]
    for section in sections():
        lines += ["", f"## {section.path or 'The run'}", "", section.text, ""]
        lines += ["| option | given as | default | |", "|---|---|---|---|"]
        for option in section.options:
            text = option.text.replace("|", "\\|")
            default = f"`{option.default}`" if option.default else "required"
            lines.append(f"| `{option.path}` | {option.kind} | {default} | {text} |")
    lines += ["", "## Presets", "", "What `algorithm.preset` fills in, where the recipe does not."]
    for name, values in PRESETS.items():
        keys = [f"`{s}.{k}={_yaml(v)}`" for s, given in values.items() for k, v in given.items()]
        lines += ["", f"**{name}**: {', '.join(keys)}"]
    return "\n".join(lines) + "\n"


def with_origins(config: TrainConfig, origins: Mapping[str, str]) -> str:
    """``config`` as a recipe with a comment behind each value: what it came from.

    Args:
        config: the effective configuration.
        origins: by dotted path, as :func:`egspo.config.recipe.load_with_origins` returns them.
    """
    lines = list(_commented(config_to_dict(config), "", origins, "default", 0))
    width = min(max(len(text) for text, _ in lines), 60)
    return "\n".join(f"{text:<{width}}  # {note}" if note else text for text, note in lines) + "\n"


def _commented(
    tree: Mapping[str, Any], prefix: str, origins: Mapping[str, str], origin: str, depth: int
) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        here = origins.get(path, origin)
        indent = "  " * depth
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_yaml(name)}:", ""
            yield from _commented(value, f"{path}.", origins, here, depth + 1)
        else:
            yield f"{indent}{_yaml(name)}: {_yaml(value)}", here


def _sections(cls: type, path: str, default: Any) -> Iterator[Section]:
    hints, texts = field_types(cls), _attribute_docs(cls)
    below, options = [], []
    for field in fields(cls):
        inner = f"{path}.{field.name}" if path else field.name
        kind = hints[field.name]
        value = getattr(default, field.name) if default is not None else _default(field)
        section = next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), None)
        if section is not None:
            assert isinstance(section, type)
            below.append((section, inner, None if value is MISSING else value))
            if kind is section:
                continue
        shown = "" if value is MISSING else _yaml(plain(value))
        options.append(Option(inner, expected(kind), shown, texts.get(field.name, "")))
    yield Section(path, " ".join((inspect.getdoc(cls) or "").split()), options)
    for section, inner, value in below:
        yield from _sections(section, inner, value)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _attribute_docs(cls: type) -> dict[str, str]:
    """The docstrings behind the fields of ``cls``, each on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def _yaml(value: Any) -> str:
    """On one line."""
    value = str(value) if isinstance(value, SameAs) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
