"""Whether anything of this project became worse between two result files, beyond noise.

    python -m benchmarks.compare BEFORE.json AFTER.json

The other implementations of a workload are its controls: they ran in the same minute, and what
changed them is the machine. A case of ours is slower if its median and its first quartile both
grew, relative to the median change of the controls, by more than

    max(least, 3 * sqrt(spread_before^2 + spread_after^2), disagreement of the controls)

in log seconds. The spread is the standard deviation of the samples, from their quartiles; it is not
divided by the root of their number, as load moves all samples of a case together. The disagreement
is the largest change of a control less the smallest. The first quartile must agree with the median
because load slows some samples and hastens none. Where torch has another version the controls
changed too: then they only widen the noise.

A case is worse too if its peak memory grew by more than ``least``, if an error against float64
more than doubled (beyond 1e-6), or if it no longer ran.

Of whole iterations (suites ``iteration`` and ``scaling``) a case is a phase, or all of them
together. Its control is the plain implementation: the median change of its phases is that of the
machine, and they disagree by the largest less the smallest; the spread is that of the iteration's
rounds. The seconds of a phase below 1 % of its iteration are not compared. FLOPs are counted: more
than 0.1 % more of them are a regression. Sizes and device must be the same.

The suites of BEFORE are compared, and AFTER must have them; ``--suites`` takes some of them. The
exit status is 1 if anything is worse, 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import compare_phases
from benchmarks.result_files import ResultFile, Row, read, suites

SUITES = ("kernels", *compare_phases.SUITES)
SIGMAS = 3.0
ERROR_FLOOR = 1e-6
SAME = ("cpu", "gpu", "threads")


class Machine(NamedTuple):
    """What the controls of a workload say about the machine, in log seconds."""

    drift: float = 0.0
    disagreement: float = 0.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--least", type=float, default=0.05, help="the smallest change that counts (0.05: 5 %%)"
    )
    parser.add_argument("--all", action="store_true", help="print every case")
    parser.add_argument("--suites", nargs="+", choices=SUITES, help="by default those of BEFORE")
    args = parser.parse_args(arguments)
    try:
        chosen = args.suites or [name for name in SUITES if name in suites(args.before)]
        cases = [
            case
            for suite in chosen or ["kernels"]
            for case in _compared(args.before, args.after, suite, args.least)
        ]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = 0
    for name, worse, note in cases:
        failed += bool(worse)
        if worse:
            print(f"WORSE {name}: {'; '.join(worse)}")
        elif args.all:
            print(f"ok    {name}{note}")
    print(f"{failed} of {len(cases)} cases worse")
    return 1 if failed else 0


def _compared(
    before_path: Path, after_path: Path, suite: str, least: float
) -> list[tuple[str, list[str], str]]:
    """Of every case of a suite its name, what became worse, and what else there is to say."""
    before, after = read(before_path, suite), read(after_path, suite)
    _same_hardware(before, after)
    changed = _changed_versions(before, after)
    for name, versions in changed.items():
        print(f"note: {name} {versions[0]} -> {versions[1]}")
    controlled = "torch" not in changed
    if suite in compare_phases.SUITES:
        found = compare_phases.regressions(before, after, least, controlled=controlled)
        return [(name, worse, "") for name, worse in found]
    return _kernel_cases(before, after, least, controlled=controlled)


def _kernel_cases(
    before: ResultFile, after: ResultFile, least: float, *, controlled: bool
) -> list[tuple[str, list[str], str]]:
    new = {row.name: row for row in after.rows}
    cases = []
    for row in before.rows:
        if not row.ours:
            continue
        machine = machine_of(row.workload, before, new)
        if not controlled:
            machine = machine._replace(drift=0.0)
        worse, note = regressions(row, new.get(row.name), machine, least), ""
        if row.name in new:
            ratio = _times(math.log(new[row.name].median / row.median))
            note = f": {ratio} the time, machine {_times(machine.drift)}"
        cases.append((row.name, worse, note))
    return cases


def machine_of(workload: str, before: ResultFile, new: dict[str, Row]) -> Machine:
    """How the other implementations of a workload changed."""
    changes = [
        math.log(new[row.name].median / row.median)
        for row in before.workloads()[workload]
        if not row.ours and row.name in new
    ]
    if not changes:
        return Machine()
    return Machine(statistics.median(changes), max(changes) - min(changes))


def regressions(before: Row, after: Row | None, machine: Machine, least: float) -> list[str]:
    """What became worse, in words."""
    if after is None:
        return ["did not run"]
    found = []
    noise = max(SIGMAS * math.hypot(before.spread, after.spread), machine.disagreement)
    allowed = max(math.log1p(least), noise)
    growth = min(
        math.log(after.median / before.median),
        math.log(after.first_quartile / before.first_quartile),
    )
    slower = growth - machine.drift
    if slower > allowed:
        found.append(
            f"{_times(slower)} slower than the machine, which changed by {_times(machine.drift)}; "
            f"noise is up to {_times(allowed)}"
        )
    memory = before.info["peak_bytes"], after.info["peak_bytes"]
    if memory[1] > (1 + least) * memory[0] + 1024:
        found.append(f"peak memory {memory[0] / 2**20:.1f} -> {memory[1] / 2**20:.1f} MiB")
    errors = before.info["errors"] or {}, after.info["errors"] or {}
    for name, error in errors[0].items():
        if name in errors[1] and errors[1][name] > 2 * error + ERROR_FLOOR:
            found.append(f"error of {name} {error:.1e} -> {errors[1][name]:.1e}")
    return found


def _times(log_ratio: float) -> str:
    return f"{math.exp(log_ratio):.2f}x"


def _same_hardware(before: ResultFile, after: ResultFile) -> None:
    for name in SAME:
        values = before.machine[name], after.machine[name]
        if values[0] != values[1]:
            raise ValueError(
                f"the files are of different machines: {name} {values[0]!r} and {values[1]!r}"
            )


def _changed_versions(
    before: ResultFile, after: ResultFile
) -> dict[str, tuple[str | None, str | None]]:
    old, new = before.machine["versions"], after.machine["versions"]
    pairs = {name: (old.get(name), new.get(name)) for name in sorted(old | new)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


if __name__ == "__main__":
    sys.exit(main())
