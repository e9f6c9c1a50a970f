"""What is counted and not timed: the bytes that kernels move, FLOPs of an iteration.

    python -m benchmarks.counted            # print the tables
    python -m benchmarks.counted --write    # into docs/benchmarks.md

Nothing here needs a GPU, and nothing depends on how busy the machine is.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Kernels are made for the interpreter or for a GPU when they are imported.
os.environ["TRITON_INTERPRET"] = "1"

from benchmarks.report import DOCUMENT, replace_section


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counted",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="into the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    args = parser.parse_args(arguments)
    body = "\n\n".join([traffic_table(), flops_table()])
    if not args.write:
        print(body)
        return
    text = args.document.read_text("utf-8")
    args.document.write_text(replace_section(text, "counted", body), "utf-8")


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
