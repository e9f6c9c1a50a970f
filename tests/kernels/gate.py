"""What the kernels over rows of logits may cost, and what the compiled code costs.

Instructions are those of a thread on its usual way; the share is of the speed of a copy, by the
model of :mod:`tests.kernels.processor`, for 512 rows of LLaDA's vocabulary in bfloat16, with the
start and the end of the grid. Nothing of it is measured.
"""

from __future__ import annotations

import dataclasses
import functools

from tests.kernels import processor, sass, variants
from tests.kernels.aot import Compiled, Target

ROWS, VOCAB, ELEMENT = 512, 126464, 2


@dataclasses.dataclass(frozen=True)
class Gate:
    """One variant of a kernel, and its limits."""

    name: str
    launch: str
    kernel: str
    """The one of the launch that passes over the logits."""
    program: int
    """Columns of a program."""
    warps: int
    repetitions: int
    """Of the loop over whole tiles."""
    moved: int
    """Bytes for a column."""
    instructions: float
    """For a column, or a pair."""
    registers: dict[int, int]
    share: dict[int, float]
    """By architecture."""


SEGMENT = 16384
GATES = (
    Gate("`token_stats`", "stats(2)", "segment_statistics_kernel",
         SEGMENT, 4, 8, 2, 9.5, {80: 40, 90: 40}, {80: 0.90, 90: 0.95}),
    Gate("`sample_tokens`, temperature 1", "sample(2)", "segment_sample_kernel",
         SEGMENT, 4, 8, 2, 10.5, {80: 48, 90: 48}, {80: 0.95, 90: 0.93}),
    Gate("`sample_tokens`, temperature 0.5", "sample(2, temperature=0.5)",
         "segment_sample_kernel", SEGMENT, 4, 8, 2, 16, {80: 48, 90: 48},
         {80: 0.85, 90: 0.83}),
    Gate("`sample_tokens`, greedy", "sample(2, temperature=0.0)", "segment_sample_kernel",
         SEGMENT, 4, 8, 2, 10, {80: 48, 90: 48},
         {80: 0.95, 90: 0.95}),
    Gate("exact KL", "stepwise(2, 2, 'exact', bf16)", "segment_kl_kernel",
         SEGMENT, 4, 16, 4, 18, {80: 48, 90: 48}, {80: 0.95, 90: 0.95}),
    Gate("gradient, without KL", "stepwise(2, 2, None, bf16)", "row_gradient_kernel",
         4096, 8, 1, 4, 18, {80: 64, 90: 64}, {80: 0.85, 90: 0.90}),
    Gate("gradient, exact KL", "stepwise(2, 2, 'exact', bf16)", "row_gradient_kernel",
         4096, 8, 1, 6, 30, {80: 80, 90: 80}, {80: 0.85, 90: 0.90}),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    instructions: float
    registers: int
    resident: int
    """Programs on a processor."""
    share: float
    spills: int


@functools.cache
def compiled(launch: str, kernel: str, capability: int) -> Compiled:
    (kernels,) = variants.kernels(Target("cuda", capability), [launch])
    (facts,) = (each for each in kernels if each.kernel == kernel)
    return facts


def cost(gate: Gate, capability: int) -> Cost:
    """Counts in the machine code."""
    facts = compiled(gate.launch, gate.kernel, capability)
    path = sass.usual_path(sass.parse(facts.listing), gate.repetitions)
    gpu = processor.GPUS[capability]
    resident = gpu.resident(facts.registers, gate.warps)
    programs = round(ROWS * VOCAB / gate.program / gpu.processors)
    taken = processor.cycles(path, gpu, programs, gate.warps, resident)
    least = programs * gate.program * gate.moved / gpu.bytes_per_cycle
    threads = 32 * gate.warps
    return Cost(
        instructions=len(path) * threads / gate.program,
        registers=facts.registers,
        resident=resident,
        share=least / taken,
        spills=facts.spills,
    )


def end_of(launch: str, kernel: str, capability: int) -> float:
    """Seconds that a call takes after its pass: the start and the run of the last kernel.

    The kernel is one wait for memory after the other: what the model has for its path, alone.
    """
    facts = compiled(launch, kernel, capability)
    gpu = processor.GPUS[capability]
    path = sass.usual_path(sass.parse(facts.listing), 1)
    programs = -(-ROWS // gpu.processors)
    resident = gpu.resident(facts.registers, 1)
    return gpu.dependent_launch + processor.cycles(path, gpu, programs, 1, resident) / gpu.clock
