"""Tables and plots of docs/benchmarks.md and docs/studies.md from the files in benchmarks/results.

    python -m benchmarks.report            # write them
    python -m benchmarks.report --check    # exit with 1 if the tables are not those of the files

What lies between ``<!-- kernels:begin -->`` and ``<!-- kernels:end -->`` is replaced, and likewise
for iteration and scaling, and in the other document for gradients and algorithms; the rest is
written by hand, or by ``python -m benchmarks.counted``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import algorithms, gradients, iteration, plots, scaling
from benchmarks.result_files import RESULTS, ResultFile, Row, read, suites

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
STUDIES = Path(__file__).parents[1] / "docs" / "studies.md"
PATTERN = "kernels*.json"
PHASED = {"iteration": iteration.section, "scaling": scaling.section}
"""Suites of whole iterations, in any file that has them: tables of their rows."""
STUDIED: dict[str, Any] = {"gradients": gradients, "algorithms": algorithms}
"""Studies, which have documents, files and plots of their own."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--studies", type=Path, default=STUDIES, help="the document of studies")
    parser.add_argument("--check", action="store_true", help="write nothing; say what is outdated")
    args = parser.parse_args(arguments)
    try:
        files = [read(path) for path in sorted(args.results.glob(PATTERN))]
        text = args.document.read_text("utf-8")
        made = replace_section(text, "kernels", body(files))
        for suite, tables in PHASED.items():
            paths = [p for p in sorted(args.results.glob("*.json")) if suite in suites(p)]
            phased = [read(path, suite) for path in paths]
            parts = [f"### {f.device}\n\n{_provenance(f)}\n\n{tables(f.rows)}" for f in phased]
            if parts:
                made = replace_section(made, suite, "\n\n".join(parts))
        found = {name: study.read_all(args.results) for name, study in STUDIED.items()}
        studies = {name: contents for name, contents in found.items() if contents}
        told = before = args.studies.read_text("utf-8") if studies else ""
        for name, contents in studies.items():
            told = replace_section(told, name, STUDIED[name].section(contents))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.check:
        old = [args.document] * (made != text) + [args.studies] * (told != before)
        for document in old:
            print(f"{document} is not what python -m benchmarks.report makes")
        return int(bool(old))
    args.document.write_text(made, "utf-8")
    if studies:
        args.studies.write_text(told, "utf-8")
    for file in files:
        for plot in plots.draw(file, args.document.parent):
            print(plot)
    for name, contents in studies.items():
        print(STUDIED[name].draw(contents, args.studies.parent))
    print(args.document)
    return 0


def replace_section(text: str, name: str, body: str) -> str:
    """``text`` with what is between the two marks of ``name`` replaced.

    Raises:
        ValueError: the marks are not there exactly once.
    """
    marks = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile("(?<={}\n).*(?={})".format(*map(re.escape, marks)), re.DOTALL)
    if any(text.count(mark) != 1 for mark in marks) or not pattern.search(text):
        raise ValueError(f"the document must hold {marks[0]} and then {marks[1]}, once each")
    return pattern.sub(lambda _: f"\n{body}\n\n" if body else "\n", text)


def body(files: list[ResultFile]) -> str:
    """Every result file, GPUs first."""
    gpus = [file for file in files if file.machine["gpu"]]
    parts = [] if gpus else ["No GPU has run these yet."]
    return "\n\n".join([*parts, *map(section, gpus + [f for f in files if f not in gpus])])


def section(file: ResultFile) -> str:
    """Everything about one result file."""
    gpu = file.machine["gpu"] is not None
    parts = [f"### {file.device}", _provenance(file), _pivot(file)]
    parts += [f"![{file.device}]({name})" for name in plots.names(file)]
    if not gpu:
        parts.insert(
            2,
            "This compares what runs without a GPU, at reduced shapes: the reference, which is "
            "written to be read and to be exact, and the compiled library, which is what a CPU "
            "gets. It says nothing about the Triton and CUDA kernels.",
        )
    functions = dict.fromkeys(row.info["function"] for row in file.rows)
    parts += [_details(file, function) for function in functions]
    parts.append(_not_run(file))
    return "\n\n".join(parts)


def _provenance(file: ResultFile) -> str:
    machine = file.machine
    versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items() if v is not None)
    where = f"{machine['cpu']}, {machine['cores']} cores, torch threads: {machine['threads']}"
    lines = [
        f"{where}; Python {machine['python']}; {versions}; commit `{machine['commit']}`.",
        *_ceilings(file),
        _load(file),
        f"\n```bash\n{machine['command']}\n```",
    ]
    return "\n".join(lines)


def _ceilings(file: ResultFile) -> list[str]:
    if file.ceilings is None:
        return []
    rates = file.ceilings["flops_per_second"]
    return [
        f"Measured in the same run: copy bandwidth {file.ceilings['bytes_per_second'] / 1e9:.1f} "
        "GB/s (read and written), matrix product "
        + ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in rates.items())
        + "."
    ]


def _load(file: ResultFile) -> str:
    before, after = file.load_average
    text = f"Load average {before:.1f} before and {after:.1f} after the run"
    busy = max(before, after) > file.machine["cores"]
    return text + (": other programs shared the machine." if busy else ".")


def _pivot(file: ResultFile) -> str:
    """Median times, a line per workload and a column per implementation."""
    ours = {row.implementation: row.ours for row in file.rows}
    names = sorted(ours, key=lambda name: not ours[name])
    lines = []
    for workload, rows in file.workloads().items():
        times = {row.implementation: row.median for row in rows}
        least = min(times.values())
        cells = [_time(times[n], bold=times[n] == least) if n in times else "" for n in names]
        lines.append([f"`{workload}`", *cells])
    return "Median time; the least of a line in bold.\n\n" + _table(["workload", *names], lines)


def _details(file: ResultFile, function: str) -> str:
    unit, scale = ("TFLOP/s", 1e12) if file.machine["gpu"] else ("GFLOP/s", 1e9)
    heads = [
        "workload",
        "implementation",
        "median",
        "spread",
        "of the floor",
        "GB/s",
        "of copy",
        unit,
        "of GEMM",
        "peak memory",
        "error against float64",
    ]
    rows = [row for row in file.rows if row.info["function"] == function]
    table = _table(heads, [_detail(row, scale) for row in rows])
    return f"<details><summary><code>{function}</code></summary>\n\n{table}\n\n</details>"


def _detail(row: Row, scale: float) -> list[str]:
    info = row.info
    errors = info["errors"]
    return [
        f"`{row.workload.partition(' ')[2]}`" + (f", {info['kl']} KL" if info["kl"] else ""),
        row.implementation + ("" if info["timing"] != "graph" else " (graph)"),
        _time(row.median),
        f"{100 * row.spread:.0f} %",
        f"{100 * info['share_of_floor']:.1f} %",
        f"{info['bytes_per_second'] / 1e9:.2f}",
        f"{100 * info['share_of_bandwidth']:.1f} %",
        f"{info['flops_per_second'] / scale:.3g}",
        f"{100 * info['share_of_gemm_rate']:.1f} %",
        f"{info['peak_bytes'] / 2**20:.2f} MiB",
        "did not fit"
        if errors is None
        else ", ".join(f"{name} {_error(error)}" for name, error in errors.items()),
    ]


def _error(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def _not_run(file: ResultFile) -> str:
    lines = []
    for reason, names in sorted(file.not_run.items()):
        what = sorted({f"{_function(n)} ({n.rpartition(' by ')[2]})" for n in names})
        lines.append([reason, str(len(names)), ", ".join(what)])
    return "Not run here:\n\n" + _table(["reason", "cases", "what"], lines)


def _function(test: str) -> str:
    return re.split(r"[ \[]", test)[0]


def _time(seconds: float, bold: bool = False) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            text = f"{seconds / scale:.3g} {unit}"
            return f"**{text}**" if bold else text
    raise AssertionError("unreachable")


_TEXT = ("workload", "implementation", "reason", "what", "error against float64")


def _table(heads: list[str], lines: Iterable[list[str]]) -> str:
    align = ["---" if head in _TEXT else "--:" for head in heads]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, align, *lines])


if __name__ == "__main__":
    sys.exit(main())
