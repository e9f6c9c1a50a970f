"""Runs a PTX program: all threads of many programs as lanes of numpy arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from tests.kernels.ptx import arithmetic as ops
from tests.kernels.ptx.memory import UNSIGNED, Memory
from tests.kernels.ptx.program import Instruction, Operand, Program

LIMIT = 2_000_000
"""Instructions of a run: more is taken for an endless loop."""


class MachineProblem(RuntimeError):
    """What the machine cannot run, or what a GPU must not: with the instruction."""


class Machine:
    """Some programs of a grid of one dimension.

    Lanes that part at a branch are run from the lowest instruction up, so that they meet again.

    Args:
        parameters: bits of each parameter.
        shared: bytes of shared memory of each program.
        ulps: how far approximate functions (ex2, lg2, rcp, div) are off.
    """

    def __init__(
        self,
        program: Program,
        memory: Memory,
        parameters: Mapping[str, int],
        programs: range,
        grid: tuple[int, int, int],
        shared: int,
        ulps: int = 0,
    ) -> None:
        self.program, self.memory, self.parameters, self.ulps = program, memory, parameters, ulps
        threads = program.threads
        self.lanes = len(programs) * threads
        self.which = np.repeat(np.arange(len(programs)), threads)
        self.shared = np.zeros((len(programs), shared), np.uint8)
        self.registers: dict[str, np.ndarray] = {}
        numbers = np.repeat(np.arange(programs.start, programs.stop, dtype=np.uint32), threads)
        columns, rows = np.uint32(grid[0]), np.uint32(grid[1])
        self.special = {
            "%tid.x": np.tile(np.arange(threads, dtype=np.uint32), len(programs)),
            "%ctaid.x": numbers % columns,
            "%ctaid.y": numbers // columns % rows,
            "%ctaid.z": numbers // (columns * rows),
            "%laneid": np.arange(self.lanes, dtype=np.uint32) % np.uint32(32),
        }
        for name, value in zip(("x", "y", "z"), grid, strict=True):
            self.special[f"%nctaid.{name}"] = np.full(self.lanes, value, np.uint32)
        self.special["%ntid.x"] = np.full(self.lanes, threads, np.uint32)

    def run(self) -> None:
        """To the end of all lanes."""
        code, end = self.program.instructions, len(self.program.instructions)
        places: np.ndarray | None = None  # where each lane is; None: all at ``place``
        place = 0
        for _ in range(LIMIT):
            mask = None
            if places is not None:
                place = int(places.min())
                mask = places == place
                if mask.all():
                    places, mask = None, None
            if place >= end:
                return
            instruction = code[place]
            active = self._guarded(instruction, mask)
            name = instruction.opcode[0]
            if name in ("bra", "ret"):
                target = end if name == "ret" else self._target(instruction)
                places, place = self._jump(places, place, target, mask, active)
                continue
            try:
                if active is None or active.any():
                    self._execute(instruction, active, mask)
            except (RuntimeError, KeyError, ValueError) as error:
                where = f"{self.program.name}: {instruction.text!r}"
                raise MachineProblem(f"{where}: {type(error).__name__}: {error}") from error
            if places is None:
                place += 1
            else:
                places[mask] = place + 1
        raise MachineProblem(f"{self.program.name}: more than {LIMIT} instructions")

    def _target(self, instruction: Instruction) -> int:
        label = instruction.operands[0]
        assert isinstance(label, str)
        return self.program.labels[label]

    def _guarded(self, instruction: Instruction, mask: np.ndarray | None) -> np.ndarray | None:
        """The lanes that run an instruction; None for all."""
        if instruction.guard is None:
            return mask
        name, value = instruction.guard
        holds = self.registers[name] == value
        if mask is not None:
            holds = holds & mask
        return None if holds.all() else holds

    def _jump(
        self,
        places: np.ndarray | None,
        place: int,
        target: int,
        mask: np.ndarray | None,
        active: np.ndarray | None,
    ) -> tuple[np.ndarray | None, int]:
        if places is None and (active is None or not active.any()):
            return None, target if active is None else place + 1
        if places is None:
            places = np.full(self.lanes, place)
        places[slice(None) if mask is None else mask] = place + 1
        places[slice(None) if active is None else active] = target
        return places, place

    # Operands.

    def bits(self, operand: Operand, size: int) -> np.ndarray:
        """Bits of a register or a constant."""
        assert isinstance(operand, str), operand
        if operand.startswith("%"):
            if operand in self.special:
                return self.special[operand]
            if operand not in self.registers:
                raise MachineProblem(f"{operand} is read before it is written")
            return self.registers[operand]
        if operand == "global_smem":
            value = 0
        elif operand.startswith(("0f", "0d")):
            value = int(operand[2:], 16)
        else:
            value = int(operand.rstrip("U"), 0)
        return np.full(self.lanes, value & (1 << size) - 1, UNSIGNED[size])

    def typed(self, operand: Operand, kind: str) -> np.ndarray:
        return ops.as_type(self.bits(operand, int(re.sub(r"\D", "", kind))), kind)

    def put(self, operand: Operand, bits: np.ndarray, active: np.ndarray | None) -> None:
        """Writes a register in the active lanes."""
        assert isinstance(operand, str), operand
        if operand == "_":
            return
        if active is not None:
            old = self.registers.get(operand)
            old = np.zeros_like(bits) if old is None else old.astype(bits.dtype, copy=False)
            bits = np.where(active, bits, old)
        self.registers[operand] = bits

    def addresses(self, operand: Operand) -> np.ndarray:
        """int64 of ``[register+offset]``."""
        assert isinstance(operand, str)
        base, _, offset = operand.strip("[] ").partition("+")
        return self.bits(base.strip(), 64).astype(np.int64) + int(offset or "0", 0)

    # Execution.

    def _execute(
        self, instruction: Instruction, active: np.ndarray | None, mask: np.ndarray | None
    ) -> None:
        name = instruction.opcode[0]
        if name in COLLECTIVE:
            self._check_together(mask if name == "bar" else active, name)
        if name in HANDLERS:
            HANDLERS[name](self, instruction, active)
        else:
            self._arithmetic(instruction, active)

    def _check_together(self, active: np.ndarray | None, name: str) -> None:
        """A barrier is met by whole programs, an exchange by whole warps."""
        if active is None:
            return
        groups = active.reshape(-1, self.program.threads if name == "bar" else 32)
        if (groups.any(1) != groups.all(1)).any():
            raise MachineProblem("some threads are elsewhere")

    def _arithmetic(self, instruction: Instruction, active: np.ndarray | None) -> None:
        name, *modifiers = instruction.opcode
        kind = modifiers[-1]
        target, *sources = instruction.operands
        with np.errstate(all="ignore"):
            if kind in ("f32", "f16", "bf16"):
                result = self._float(name, modifiers, kind, sources)
            elif kind == "pred":
                values = [self.bits(source, 8) for source in sources]
                result = (
                    {"not": np.logical_not}[name](*values)
                    if len(values) == 1
                    else {
                        "and": np.logical_and,
                        "or": np.logical_or,
                        "xor": np.logical_xor,
                    }[name](*values)
                )
                self.put(target, result, active)
                return
            else:
                result = self._integer(name, modifiers, kind, sources)
                kind = f"u{8 * result.dtype.itemsize}"
        self.put(target, ops.as_bits(result, kind), active)

    def _float(
        self, name: str, modifiers: list[str], kind: str, sources: list[Operand]
    ) -> np.ndarray:
        values = [self.typed(source, kind) for source in sources]
        if kind == "f32" and "ftz" in modifiers:
            values = [ops.flush(value) for value in values]
        if name in ("min", "max"):
            result = ops.extreme(name, "NaN" in modifiers, *values)
        elif name in ops.APPROXIMATE:
            result = ops.nudge(ops.APPROXIMATE[name](*values), self.ulps)
        else:
            result = ops.FLOAT[name](*values)
        return ops.flush(result) if kind == "f32" and "ftz" in modifiers else result

    def _integer(
        self, name: str, modifiers: list[str], kind: str, sources: list[Operand]
    ) -> np.ndarray:
        if name in ("shl", "shr"):
            return ops.shifted(name, self.typed(sources[0], kind), self.bits(sources[1], 32))
        if name == "bfe" and kind.startswith("u"):
            start, length = (self.bits(source, 32) for source in sources[1:])
            field = ops.shifted("shr", self.typed(sources[0], kind), start)
            ones = ops.shifted("shl", np.ones_like(field), length) - field.dtype.type(1)
            return field & ones
        form = next((each for each in modifiers if each in ("lo", "hi", "wide")), "lo")
        values = [self.typed(source, kind) for source in sources[:2]]
        if name in ("mul", "mad"):
            result = ops.multiplied(form, *values)
            if name == "mad":
                size = 8 * result.dtype.itemsize
                result = result + self.bits(sources[2], size).astype(result.dtype)
            return result
        if name in ("min", "max") and "relu" in modifiers:
            return np.maximum(ops.extreme(name, True, *values), 0)
        return INTEGER[name](*values)


INTEGER: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
}
Handler = Callable[[Machine, Instruction, "np.ndarray | None"], None]
HANDLERS: dict[str, Handler] = {}
COLLECTIVE = ("bar", "shfl", "redux", "ldmatrix")
