"""What is counted and not timed: compiled kernels, the bytes they move, FLOPs of an iteration.

    python -m benchmarks.counted            # print the tables
    python -m benchmarks.counted --write    # into docs/benchmarks.md

Nothing here needs a GPU, and nothing depends on how busy the machine is.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

# Kernels are made for the interpreter or for a GPU when they are imported.
os.environ["TRITON_INTERPRET"] = "1"

from benchmarks.report import DOCUMENT, replace_section

if TYPE_CHECKING:
    from tests.kernels.aot import Compiled

THREADS = 256
REGISTERS = 65536
"""Of a processor of sm_80, sm_90 and sm_100, given out by 256 for a warp."""
MOST_THREADS = 2048

KERNELS = {
    "block_statistics_kernel#0": ("`token_stats`", 8192),
    "block_sample_kernel#0": ("`sample_tokens`", 4096),
    "block_kl_kernel#0": ("`stepwise_surrogate`, exact KL", 8192),
    "row_gradient_kernel#1": ("its gradient, without KL", 4096),
    "row_gradient_kernel#0": ("its gradient, exact KL", 4096),
}
"""By kernel and variant: what it serves, and the logits of a program."""

SCRIPT = """
stats(2, LLADA)
sample(2, LLADA, temperature=0.5)
stepwise(2, 2, "exact")
stepwise(2, 2, None)
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counted",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="into the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    args = parser.parse_args(arguments)
    body = "\n\n".join([compiled_table(), traffic_table(), flops_table()])
    if not args.write:
        print(body)
        return
    text = args.document.read_text("utf-8")
    args.document.write_text(replace_section(text, "counted", body), "utf-8")


def compiled_table() -> str:
    """Registers and memory accesses of the kernels that pass over rows of logits."""
    from tests.kernels.aot import ARCHITECTURES, compiled
    from tests.kernels.launches import STATISTICS, SURROGATE

    variants = [compiled(STATISTICS + SURROGATE + SCRIPT, each) for each in ARCHITECTURES]
    names = " / ".join(f"sm_{each}" for each in ARCHITECTURES)
    lines = [
        f"bfloat16 logits, V = 126464; {names} where three numbers stand.",
        "",
        "| kernel | serves | registers | programs on a processor | spills | shared bytes "
        "| instructions for a logit | widest access | bytes read for a logit | written |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for key, (purpose, block) in KERNELS.items():
        facts = [each[key] for each in variants]
        cells = [
            [fact.registers for fact in facts],
            [resident(fact.registers) for fact in facts],
            [fact.spills for fact in facts],
            [fact.shared for fact in facts],
            [f"{fact.instructions * THREADS / block:.1f}" for fact in facts],
            [f"{widest(fact)} bits" for fact in facts],
            [f"{fact.read / block:.2f}" for fact in facts],
            [f"{fact.written / block:.2f}" for fact in facts],
        ]
        text = " | ".join(_joined(cell) for cell in cells)
        lines.append(f"| `{facts[0].kernel}` | {purpose} | {text} |")
    return "\n".join(lines)


def resident(registers: int) -> int:
    """Programs of :data:`THREADS` threads that the registers of a processor hold at once."""
    each = -(-registers // 8) * 8 * THREADS
    return min(REGISTERS // each, MOST_THREADS // THREADS)


def widest(facts: Compiled) -> int:
    """Bits of the widest load of a thread."""
    sizes = [width.removeprefix("v").split(".") for width in facts.loads]
    return max(int(size[-1]) * (int(size[0]) if len(size) > 1 else 1) for size in sizes)


def _joined(cell: list[object]) -> str:
    """One value where all are the same."""
    values = [str(value) for value in cell]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def traffic_table() -> str:
    """Bytes that whole calls move, counted while the interpreter runs them."""
    import torch

    from tests.kernels.traffic import CASES, LLADA, measured

    rows = 2
    lines = [
        "Bytes for each bfloat16 logit, of all kernels of a call together, at V = 126464: "
        "masked-out elements and matrix products are left out.",
        "",
        "| call | read | at least | written | at least | over |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for case in CASES:
        traffic = measured(case, torch.bfloat16, rows=rows)
        read, written = (n / (rows * LLADA) for n in (traffic.read, traffic.written))
        least = 2 * (case.reads + case.writes)
        over = 100 * ((read + written) / least - 1)
        lines.append(
            f"| `{case.name}` | {read:.3f} | {2 * case.reads} | {written:.3f} | {2 * case.writes} "
            f"| {over:.2f} % |"
        )
    return "\n".join(lines)


def flops_table() -> str:
    """FLOPs of an iteration at LLaDA-8B's sizes."""
    from benchmarks.iteration.measure import ALGORITHMS
    from benchmarks.iteration.problem import LLADA_8B
    from benchmarks.iteration.tables import counted_rows, table

    problem = LLADA_8B
    rows = [row for algorithm in ALGORITHMS for row in counted_rows(problem, algorithm)]
    return (
        f"FLOPs of one iteration of LLaDA-8B: {problem.prompts} prompt of {problem.prompt_tokens} "
        f"tokens, {problem.group_size} completions of {problem.new_tokens} in {problem.steps} "
        f"steps, K = {problem.selected_steps}, LoRA of rank {problem.lora_rank}, a reference "
        "policy, gradient checkpointing. The passes are those that both implementations make; a "
        "pass costs what its matrix products do.\n\n" + table(rows)
    )


if __name__ == "__main__":
    main()
