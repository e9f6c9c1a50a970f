"""PTX text as a list of instructions."""

from __future__ import annotations

import dataclasses
import re

Operand = str | tuple[str, ...]
"""A register, a constant or an address as written; a tuple for ``{a, b}``."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: tuple[str, ...]
    """``("add", "s32")`` for ``add.s32``."""
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    """A predicate, and the value of it with which the instruction runs."""
    text: str


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Label to the index of the instruction after it."""


class SyntaxProblem(ValueError):
    """PTX that this reader does not understand."""


def parse(ptx: str) -> Program:
    """The one kernel of a module as Triton writes it."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{(.*)\}", ptx, re.S)
    if entry is None:
        raise SyntaxProblem("no .entry")
    name, parameters, directives, body = entry.groups()
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", directives)
    if threads is None:
        raise SyntaxProblem(f"{name}: no .reqntid")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _statements(body):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        else:
            instructions.append(_instruction(statement))
    return Program(
        name,
        tuple(re.findall(r"\.param\b[^,]*?([\w$]+)\s*(?:,|$)", parameters.strip())),
        int(threads[1]),
        tuple(instructions),
        labels,
    )


def _statements(body: str) -> list[str]:
    """Labels, with their colon, and instructions; directives are dropped."""
    # A .section of debug information stands behind the instructions.
    body = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*$", "", body.split(".section")[0], flags=re.M)
    found = []
    for piece in re.split(r";|(\$?[A-Za-z_$][\w$]*:)(?=\s)|^\s*[{}]\s*$", body, flags=re.M):
        statement = " ".join((piece or "").split())
        if statement and not statement.startswith("."):
            found.append(statement)
    return found


def _instruction(text: str) -> Instruction:
    guard = None
    rest = text
    if text.startswith("@"):
        predicate, rest = text[1:].split(None, 1)
        guard = (predicate.lstrip("!"), not predicate.startswith("!"))
    opcode, _, operands = rest.partition(" ")
    return Instruction(tuple(opcode.split(".")), _operands(operands), guard, text)


def _operands(text: str) -> tuple[Operand, ...]:
    found: list[Operand] = []
    for braced, plain in re.findall(r"\{([^}]*)\}|([^,{}]+)", text):
        if braced:
            found.append(tuple(part.strip() for part in braced.split(",")))
        elif plain.strip():
            found.append(plain.strip())
    return tuple(found)
