"""Machine code as nvdisasm lists it: blocks, and the instructions of the way that data takes."""

from __future__ import annotations

import dataclasses
import re

EXCHANGES = ("SHFL", "LDS", "STS", "LDSM", "STSM", "BAR")
WIDE = re.compile(r"\b(LDG|STG)\.\S*128")


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str
    """With its modifiers: ``LDG.E.128``."""
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    target: str | None = None
    """Label that a branch goes to."""
    conditional: bool = False

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclasses.dataclass
class Block:
    label: str
    instructions: list[Instruction]

    @property
    def is_wide(self) -> bool:
        """Whether it moves 16 bytes a thread: the data."""
        return any(WIDE.match(each.opcode) for each in self.instructions)

    @property
    def repeats(self) -> bool:
        return self.instructions[-1].target == self.label


def parse(listing: str) -> list[Block]:
    """The blocks of the one kernel of a listing, in order."""
    blocks = [Block("entry", [])]
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        code = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
        if label:
            blocks.append(Block(label[1], []))
        elif code and not code[1].startswith("NOP"):
            instruction = _instruction(code[1])
            blocks[-1].instructions.append(instruction)
            if instruction.name in ("BRA", "EXIT", "RET"):
                blocks.append(Block("", []))
    return [block for block in blocks if block.instructions]


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@!?(U?P\w+)\s+", text)
    body = text[guard.end() :] if guard else text
    opcode, _, rest = body.partition(" ")
    operands = [part.strip() for part in rest.split(",")] if rest else []
    target = re.search(r"\((\.L_x_\d+)\)", rest)
    # ``@P0 BRA P1, label`` depends on P1 too.
    named = [re.findall(r"\bU?(?:R|P)\d+\b", part) for part in operands]
    no_result = opcode.split(".")[0] in ("STG", "STS", "BAR", "BRA", "EXIT", "RED")
    writes = [] if no_result or not named else named[0][:1]
    reads = [name for names in (named if no_result else named[1:]) for name in names]
    if guard:
        reads.append(guard[1])
    count = 4 if ".128" in opcode else 2 if ".64" in opcode or "WIDE" in opcode else 1
    if writes and writes[0][0] == "R" and count > 1:
        first = int(writes[0][1:])
        writes = [f"R{first + step}" for step in range(count)]
    conditional = (guard is not None and guard[1] != "PT") or bool(re.match(r"\s*U?P\d", rest))
    return Instruction(
        opcode, tuple(writes), tuple(reads), target[1] if target else None, conditional
    )


def exchanges(blocks: list[Block]) -> int:
    """Instructions by which threads exchange values, in the loops that move data."""
    loops = [block for block in blocks if block.repeats and block.is_wide]
    assert loops, "no loop moves 16 bytes a thread"
    return sum(each.name in EXCHANGES for block in loops for each in block.instructions)


def usual_path(blocks: list[Block], repetitions: int) -> list[Instruction]:
    """What a thread executes where nothing special happens.

    Branches forward are taken, unless they skip the moving of data: they skip special cases. The
    loop that moves data, if there is one, runs ``repetitions`` times, other loops not at all.
    """
    place = {block.label: number for number, block in enumerate(blocks)}
    path: list[Instruction] = []
    number = 0
    while number < len(blocks):
        block = blocks[number]
        path += block.instructions * (repetitions if block.repeats and block.is_wide else 1)
        last = block.instructions[-1]
        if last.name == "EXIT" and not last.conditional:
            break
        goal = place[last.target] if last.target else number
        skipped = blocks[number + 1 : goal]
        taken = goal > number and not (last.conditional and any(each.is_wide for each in skipped))
        number = goal if taken else number + 1
    assert path[-1].name == "EXIT" and all(each.name != "CALL" for each in path), "not a usual way"
    return path
