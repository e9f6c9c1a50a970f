"""What every benchmark shares: ceilings, the record beside the numbers, and what did not run."""

from __future__ import annotations

import os
import shlex
from typing import Any

import pytest
import torch

from benchmarks.hardware import provenance
from benchmarks.kernels.peers import DISTRIBUTIONS, version_of
from benchmarks.timing import measure_ceilings

_CEILINGS = pytest.StashKey[dict[str, Any]]()
_LOAD_BEFORE = pytest.StashKey[float]()
_NOT_RUN: dict[str, list[str]] = {}
"""Reason to the names of the tests it kept from running."""


def pytest_configure(config: pytest.Config) -> None:
    _NOT_RUN.clear()
    config.stash[_LOAD_BEFORE] = _load()


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config) -> dict[str, Any]:
    """Copy bandwidth and matrix product rate of the device, measured in this run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pytestconfig.stash[_CEILINGS] = measure_ceilings(device)
    return pytestconfig.stash[_CEILINGS]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        name = report.nodeid.partition("[")[2].rstrip("]") or report.nodeid
        _NOT_RUN.setdefault(reason, []).append(name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _NOT_RUN:
        return
    terminalreporter.section("not run here")
    for reason, names in sorted(_NOT_RUN.items()):
        terminalreporter.line(f"{len(names):4d}  {reason}")


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Instead of pytest-benchmark's, which has the name of the machine."""
    threads = os.environ.get("OMP_NUM_THREADS")
    command = [f"OMP_NUM_THREADS={threads}"] if threads else []
    command += ["pytest", *(str(argument) for argument in config.invocation_params.args)]
    record = provenance(shlex.join(command))
    record["versions"] |= {name: version_of(name) for name in DISTRIBUTIONS}
    return record


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {"id": provenance("")["commit"]}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """The samples are left out: their quartiles stay."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        for redundant in ("options", "params", "param"):
            benchmark.pop(redundant, None)
    output_json["ceilings"] = config.stash.get(_CEILINGS, None)
    output_json["load_average"] = [config.stash[_LOAD_BEFORE], _load()]
    output_json["not_run"] = _NOT_RUN


def _load() -> float:
    """Processes that wanted to run in the last minute: more than the cores slows a CPU run."""
    return os.getloadavg()[0]
