"""The compiled kernels over rows of logits: instructions, registers, and a modelled share of copy.

    python -m benchmarks.kernels.modelled            # print the table
    python -m benchmarks.kernels.modelled --write    # into docs/kernels.md

Counted in machine code and modelled: nothing here is measured, and nothing needs a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.report import replace_section
from tests.kernels.gate import GATES, ROWS, cost
from tests.kernels.processor import GPUS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.modelled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="into the document")
    args = parser.parse_args(arguments)
    body = table()
    if not args.write:
        print(body)
        return
    DOCUMENT.write_text(replace_section(DOCUMENT.read_text("utf-8"), "modelled", body), "utf-8")


def table() -> str:
    """One line for each variant; limits of the test in brackets."""
    names = ", ".join(f"sm_{each}: {gpu.name}" for each, gpu in sorted(GPUS.items()))
    lines = [
        f"bfloat16, V = 126464, {ROWS} rows; {names}. Counted and modelled, not measured; "
        "limits of `tests/kernels/test_gate.py` in brackets.",
        "",
        "| kernel | architecture | instructions a logit (a pair) | registers | programs on a "
        "processor | modelled share of copy speed |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for gate in GATES:
        for capability in sorted(GPUS):
            found = cost(gate, capability)
            lines.append(
                f"| {gate.name} | sm_{capability} "
                f"| {found.instructions:.1f} (≤ {gate.instructions:g}) "
                f"| {found.registers} (≤ {gate.registers[capability]}) | {found.resident} "
                f"| {found.share:.0%} (≥ {gate.share[capability]:.0%}) |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
