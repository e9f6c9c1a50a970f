"""The rooms of the house: which module imports which, and the picture of it in the documentation.

``python -m tests.rooms`` draws the picture in ``docs/architecture.md`` again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"

ROOMS = {
    "egspo_kernels": "kernels and their references",
    "files": "whole or not at all",
    "sandbox": "programs that a model wrote",
    "config": "options, presets, recipes",
    "models": "LLaDA, Dream, SDAR, LLaDA2, adapters",
    "tasks": "data, splits, answers, prompts",
    "rollouts": "prompts to trajectories",
    "rewards": "calls, queues, scores",
    "engines": "one process or many",
    "runs": "what a run leaves on disk",
    "serving": "completions of a trained model",
    "algorithm": "trajectories to loss",
    "inspection": "plots, pages, tables",
    "training": "a run, from recipe to model",
    "planning": "what a run will need",
    "evaluations": "tables with intervals",
    "cli": "a file a command",
}
"""From the ground up: a room imports from those above it in this list, never from one below."""

# The version number alone is read from the top.
_VERSION = "egspo"


def imports() -> dict[str, set[str]]:
    """Modules of both packages, and those that each imports: anywhere in it, for types too."""
    files = {_module(f): f for p in ("egspo", "egspo_kernels") for f in (ROOT / p).rglob("*.py")}
    return {
        name: {found for found in _imported(file, files) if found != name}
        for name, file in files.items()
    }


def room_of(module: str) -> str:
    """The room of a module; raises KeyError for one that has none."""
    package, _, rest = module.partition(".")
    room = package if package == "egspo_kernels" else rest.partition(".")[0]
    if room not in ROOMS:
        raise KeyError(f"{module} has no room: add it to one of {list(ROOMS)}")
    return room


def room_imports(modules: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Rooms, and those that their modules import."""
    result: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, others in modules.items():
        if module != _VERSION:
            found = {room_of(other) for other in others if other != _VERSION}
            result[room_of(module)] |= found - {room_of(module)}
    return result


def picture() -> str:
    """The rooms as a mermaid graph: an arrow for each import that no other path implies."""
    rooms = room_imports(imports())
    below: dict[str, set[str]] = {}
    for room in TopologicalSorter(rooms).static_order():
        below[room] = rooms[room].union(*(below[other] for other in rooms[room]))
    lines = ["```mermaid", "flowchart BT"]
    lines += [f'    {room}["<b>{room}</b><br>{text}"]' for room, text in ROOMS.items()]
    for room, others in rooms.items():
        direct = others - set().union(*(below[other] for other in others))
        lines += [f"    {other} --> {room}" for other in ROOMS if other in direct]
    return "\n".join([*lines, "```"])


def drawn(page: str) -> str:
    """The page with today's picture in the place of its own."""
    return re.sub(r"```mermaid\n.*?```", lambda _: picture(), page, count=1, flags=re.S)


def _module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imported(file: Path, modules: Mapping[str, Path]) -> Iterable[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text("utf-8")), "utf-8")
