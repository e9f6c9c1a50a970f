"""A model of one GPU processor that runs the machine code of a kernel: no measurement.

Four schedulers issue one instruction a cycle each, for the warp that can go first. An instruction
waits for its operands and for its pipe; loads share the processor's part of the memory's speed.
What the model leaves out (bank conflicts, instruction fetch, clock changes, the other processors)
makes a real one slower: it tells variants apart, and what could not be fast from what could.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

from tests.kernels.sass import Instruction

SCHEDULERS = 4


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Facts about a GPU. Bandwidth is what a copy reaches."""

    name: str
    processors: int
    clock: float
    """Cycles a second."""
    copy: float
    """Bytes a second."""
    fma: int
    """Cycles that a float32 instruction of a warp keeps its pipe."""
    dependent_launch: float
    """Seconds from the end of a kernel to the first instruction after it in the next one."""
    registers: int = 65536
    warps: int = 64
    programs: int = 32

    @property
    def bytes_per_cycle(self) -> float:
        """Of one processor."""
        return self.copy / self.processors / self.clock

    def resident(self, registers: int, warps: int) -> int:
        """Programs of so many warps that a processor holds."""
        each = -(-registers // 8) * 8 * 32 * warps
        return min(self.registers // each, self.warps // warps, self.programs)


GPUS = {
    80: Gpu("A100 80GB", 108, 1.41e9, 1.75e12, fma=2, dependent_launch=1.5e-6),
    90: Gpu("H200", 132, 1.98e9, 4.3e12, fma=1, dependent_launch=0.7e-6),
}
"""The copy speed of an H200 is a measured one; that of an A100 is assumed."""

PIPES = {
    "MUFU": ("special", 8),
    "I2F": ("special", 8),
    "F2I": ("special", 8),
    "FRND": ("special", 8),
    "LDG": ("memory", 4),
    "STG": ("memory", 4),
    "LDS": ("memory", 4),
    "STS": ("memory", 4),
    "SHFL": ("memory", 4),
    "IMAD": ("fma", 2),
    "HFMA2": ("half", 1),
    "HADD2": ("half", 2),
    "BRA": ("control", 1),
    "BAR": ("control", 1),
    "EXIT": ("control", 1),
    "BSSY": ("control", 1),
    "BSYNC": ("control", 1),
    "LDC": ("constant", 2),
    "S2R": ("constant", 2),
}
LATENCIES = {"special": 20, "memory": 25, "fma": 4, "half": 5, "alu": 5, "constant": 25}
DRAM_LATENCY, L2_LATENCY = 700, 300
BARRIER = 20
LAUNCH = 300
"""Cycles until a program that ended is replaced."""


def pipe_of(instruction: Instruction, gpu: Gpu) -> tuple[str, int]:
    """Pipe, and cycles for which a warp's instruction keeps it."""
    name = instruction.name
    if name in ("FADD", "FMUL", "FFMA"):
        return "fma", gpu.fma
    if name.startswith("U"):
        return "uniform", 2
    return PIPES.get(name, ("alu", 2))


@dataclasses.dataclass
class _Program:
    ended: int = 0
    waiting: list[_Warp] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Warp:
    program: _Program
    place: int = 0
    ready: dict[str, float] = dataclasses.field(default_factory=dict)


def cycles(
    path: Sequence[Instruction], gpu: Gpu, programs: int, warps: int, resident: int
) -> float:
    """Cycles in which a processor runs so many programs of so many warps, ``resident`` at once.

    The schedulers do the same things: one is modelled, with its part of warps and of memory.
    """
    if warps < SCHEDULERS:
        programs, resident = (-(-count * warps // SCHEDULERS) for count in (programs, resident))
    warps = max(1, warps // SCHEDULERS)
    speed = gpu.bytes_per_cycle / SCHEDULERS
    steps = [(each, *pipe_of(each, gpu)) for each in path]
    queue: list[tuple[float, int, _Warp]] = []
    free: dict[str, float] = {}
    clock = memory = end = 0.0
    order = started = 0

    def enqueue(time: float, warp: _Warp, age: int | None = None) -> None:
        nonlocal order
        heapq.heappush(queue, (time, order if age is None else age, warp))
        order += age is None

    def start(time: float) -> None:
        nonlocal started
        program = _Program()
        for _ in range(warps):
            enqueue(time, _Warp(program))
        started += 1

    for _ in range(min(resident, programs)):
        start(0.0)
    while queue:
        time, age, warp = heapq.heappop(queue)
        instruction, pipe, busy = steps[warp.place]
        when = max(time, clock, free.get(pipe, 0.0))
        for name in (*instruction.reads, *instruction.writes):
            when = max(when, warp.ready.get(name, 0.0))
        if when > time and queue and queue[0][0] < when:
            enqueue(when, warp, age)  # others go first
            continue
        clock, free[pipe] = when + 1, when + busy
        if instruction.name in ("LDG", "STG") and ".128" in instruction.opcode:
            memory = max(memory, when) + 512 / speed
            done = max(memory, when + DRAM_LATENCY)
        elif instruction.name == "LDG":
            done = when + L2_LATENCY
        else:
            done = when + LATENCIES.get(pipe, 5)
        for name in instruction.writes:
            warp.ready[name] = done
        warp.place += 1
        end = max(end, when)
        program = warp.program
        if instruction.name == "BAR":
            program.waiting.append(warp)
            if len(program.waiting) == warps:
                for other in program.waiting:
                    enqueue(when + BARRIER, other)
                program.waiting = []
        elif warp.place < len(steps):
            enqueue(when + 1, warp, age)
        else:
            program.ended += 1
            if program.ended == warps and started < programs:
                start(when + LAUNCH)
    return max(end, memory)
