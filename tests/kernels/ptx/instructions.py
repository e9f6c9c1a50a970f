"""Instructions that are no arithmetic: memory, moves, conversions, exchanges between threads."""

from __future__ import annotations

import re

import numpy as np

from tests.kernels.ptx import arithmetic as ops
from tests.kernels.ptx.machine import HANDLERS, Machine, MachineProblem
from tests.kernels.ptx.memory import UNSIGNED, AccessProblem
from tests.kernels.ptx.program import Instruction, Operand

Active = np.ndarray | None


def _width(instruction: Instruction) -> tuple[int, int]:
    """Bits and count of what a load or a store moves."""
    kind = instruction.opcode[-1]
    vector = next((part for part in instruction.opcode if re.fullmatch(r"v\d", part)), "v1")
    return int(re.sub(r"\D", "", kind)), int(vector[1:])


def _many(operand: Operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _lanes(machine: Machine, active: Active) -> np.ndarray:
    return np.arange(machine.lanes) if active is None else np.nonzero(active)[0]


def _shared_places(
    machine: Machine, addresses: np.ndarray, lanes: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices into shared memory of each byte that some lanes access."""
    if (addresses % width).any():
        raise AccessProblem(f"shared access of {width} bytes is not aligned")
    if (addresses < 0).any() or (addresses + width > machine.shared.shape[1]).any():
        raise AccessProblem(f"shared access of {width} bytes out of bounds")
    return machine.which[lanes][:, None], addresses[:, None] + np.arange(width)


def load(machine: Machine, instruction: Instruction, active: Active) -> None:
    target, source = instruction.operands
    bits, count = _width(instruction)
    if instruction.opcode[1] == "param":
        assert isinstance(source, str)
        value = machine.parameters[source.strip("[]")] & (1 << bits) - 1
        machine.put(target, np.full(machine.lanes, value, UNSIGNED[bits]), active)
        return
    lanes = _lanes(machine, active)
    addresses = machine.addresses(source)[lanes]
    if instruction.opcode[1] == "global":
        values = machine.memory.load(addresses, bits, count)
    elif instruction.opcode[1] == "shared":
        place = _shared_places(machine, addresses, lanes, bits // 8 * count)
        values = np.ascontiguousarray(machine.shared[place]).view(UNSIGNED[bits]).T
    else:
        raise MachineProblem("no such memory")
    for register, value in zip(_many(target), values, strict=True):
        full = np.zeros(machine.lanes, UNSIGNED[bits])
        full[lanes] = value
        machine.put(register, full, active)


def store(machine: Machine, instruction: Instruction, active: Active) -> None:
    target, source = instruction.operands
    bits, _ = _width(instruction)
    lanes = _lanes(machine, active)
    addresses = machine.addresses(target)[lanes]
    values = [machine.bits(each, bits)[lanes].astype(UNSIGNED[bits]) for each in _many(source)]
    if instruction.opcode[1] == "global":
        machine.memory.store(addresses, bits, values)
    elif instruction.opcode[1] == "shared":
        place = _shared_places(machine, addresses, lanes, bits // 8 * len(values))
        data = np.ascontiguousarray(np.stack(values, axis=1)).view(np.uint8)
        machine.shared[place] = data.reshape(len(lanes), -1)
    else:
        raise MachineProblem("no such memory")


def move(machine: Machine, instruction: Instruction, active: Active) -> None:
    target, source = instruction.operands
    kind = instruction.opcode[-1]
    if kind == "pred":
        assert isinstance(source, str)
        known = source.startswith("%")
        value = machine.bits(source, 8) if known else np.full(machine.lanes, int(source, 0) != 0)
        machine.put(target, value.astype(bool), active)
        return
    size = int(re.sub(r"\D", "", kind))
    if isinstance(target, tuple):
        whole, part = machine.bits(source, size).astype(UNSIGNED[size]), size // len(target)
        for number, register in enumerate(target):
            piece = whole >> UNSIGNED[size](part * number)
            machine.put(register, piece.astype(UNSIGNED[part]), active)
    elif isinstance(source, tuple):
        part, whole = size // len(source), np.zeros(machine.lanes, UNSIGNED[size])
        for number, register in enumerate(source):
            piece = machine.bits(register, part).astype(UNSIGNED[part]).astype(UNSIGNED[size])
            whole |= piece << UNSIGNED[size](part * number)
        machine.put(target, whole, active)
    else:
        machine.put(target, machine.bits(source, size).astype(UNSIGNED[size]), active)


def convert(machine: Machine, instruction: Instruction, active: Active) -> None:
    to, source_kind = instruction.opcode[-2:]
    target, *sources = instruction.operands
    if to.endswith("x2"):
        high, low = (ops.as_bits(machine.typed(each, source_kind), to[:-2]) for each in sources)
        packed = high.astype(np.uint32) << np.uint32(16) | low.astype(np.uint32)
        machine.put(target, packed, active)
        return
    values = machine.typed(sources[0], source_kind)
    if to.startswith(("f", "bf")):
        values = values.astype(np.float32)
    elif values.dtype.kind == "f":
        raise MachineProblem("float to integer")
    machine.put(target, ops.as_bits(values, to), active)


def set_predicate(machine: Machine, instruction: Instruction, active: Active) -> None:
    target, a, b = instruction.operands
    kind = instruction.opcode[-1]
    result = ops.compare(instruction.opcode[1], machine.typed(a, kind), machine.typed(b, kind))
    machine.put(target, result, active)


def select(machine: Machine, instruction: Instruction, active: Active) -> None:
    target, a, b, predicate = instruction.operands
    size = int(re.sub(r"\D", "", instruction.opcode[-1]))
    values = [machine.bits(each, size).astype(UNSIGNED[size]) for each in (a, b)]
    machine.put(target, np.where(machine.bits(predicate, 8), *values), active)


def shuffle(machine: Machine, instruction: Instruction, active: Active) -> None:
    target, source, distance, *_ = instruction.operands
    if "bfly" not in instruction.opcode:
        raise MachineProblem("only butterflies")
    assert isinstance(distance, str)
    partner = np.arange(machine.lanes) ^ int(distance, 0)
    machine.put(target, machine.bits(source, 32)[partner], active)


def reduce_warp(machine: Machine, instruction: Instruction, active: Active) -> None:
    target, source, _ = instruction.operands
    kind = instruction.opcode[-1]
    function = {"min": np.minimum, "max": np.maximum, "add": np.add}[instruction.opcode[2]]
    warps = machine.typed(source, kind).reshape(-1, 32)
    result = np.repeat(function.reduce(warps, axis=1, dtype=warps.dtype), 32)
    machine.put(target, ops.as_bits(result, kind), active)


def load_matrix(machine: Machine, instruction: Instruction, active: Active) -> None:
    """``ldmatrix.x1``: lane l gets word l % 4 of the 16 bytes that lane l / 4 points at."""
    (target,), source = instruction.operands[0], instruction.operands[1]
    if "x1" not in instruction.opcode or "trans" in instruction.opcode:
        raise MachineProblem("only x1")
    lanes = np.arange(machine.lanes)
    addresses = machine.addresses(source)
    row = addresses[lanes // 32 * 32 + lanes % 32 // 4]
    if (row % 16).any():
        raise AccessProblem("ldmatrix is not aligned to 16 bytes")
    place = _shared_places(machine, row + lanes % 4 * 4, lanes, 4)
    value = np.ascontiguousarray(machine.shared[place]).view(np.uint32)[:, 0]
    machine.put(target, value, active)


def nothing(machine: Machine, instruction: Instruction, active: Active) -> None:
    """Barriers, and waiting for an earlier kernel: lanes and launches run in order here."""
    del machine, instruction, active


HANDLERS.update(
    {
        "ld": load,
        "st": store,
        "mov": move,
        "cvt": convert,
        "setp": set_predicate,
        "selp": select,
        "shfl": shuffle,
        "redux": reduce_warp,
        "ldmatrix": load_matrix,
        "bar": nothing,
        "griddepcontrol": nothing,
    }
)
