"""Reading what ``pytest benchmarks/ --benchmark-only --benchmark-json=FILE`` wrote."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One implementation on one workload."""

    workload: str
    implementation: str
    median: float
    """Seconds of one call, as the others."""
    first_quartile: float
    spread: float
    """Standard deviation of log seconds, from the quartiles: what one sample is off by."""
    info: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.workload} by {self.implementation}"

    @property
    def ours(self) -> bool:
        return self.implementation.startswith("egspo ")


@dataclass(frozen=True)
class ResultFile:
    path: Path
    machine: dict[str, Any]
    """Hardware, versions, commit and command: :func:`benchmarks.hardware.provenance`."""
    ceilings: dict[str, Any] | None
    """None where no kernel was measured."""
    load_average: list[float]
    not_run: dict[str, list[str]]
    rows: list[Row]

    @property
    def device(self) -> str:
        return self.machine["gpu"] or self.machine["cpu"]

    def workloads(self) -> dict[str, list[Row]]:
        """Rows by workload, in the order of the suite."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.workload, []).append(row)
        return groups


def read(path: Path, suite: str = "kernels") -> ResultFile:
    """The rows of one suite in a result file.

    Raises:
        ValueError: not a result file, or without a row of the suite.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        rows = [_row(each) for each in content["benchmarks"] if _suite(each) == suite]
        result = ResultFile(
            path,
            content["machine_info"],
            content["ceilings"],
            content["load_average"],
            content["not_run"],
            rows,
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result file of these benchmarks: {error!r}") from error
    if not rows:
        raise ValueError(f"{path} has no result of the suite {suite!r}")
    return result


def suites(path: Path) -> set[str | None]:
    """The suites of which a file has results; none for JSON of another kind.

    Raises:
        ValueError: it is not JSON.
    """
    content = json.loads(path.read_text("utf-8"))
    return {_suite(each) for each in content.get("benchmarks", [])}


def _suite(benchmark: dict[str, Any]) -> str | None:
    return benchmark["extra_info"].get("suite")


def _row(benchmark: dict[str, Any]) -> Row:
    stats, info = benchmark["stats"], benchmark["extra_info"]
    # Between the quartiles of a normal distribution lie 1.349 standard deviations.
    spread = math.log(stats["q3"] / stats["q1"]) / 1.349
    return Row(
        benchmark["group"], info["implementation"], stats["median"], stats["q1"], spread, info
    )
