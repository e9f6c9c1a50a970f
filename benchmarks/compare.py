"""Whether anything became worse between two result files, beyond noise.

    python -m benchmarks.compare BEFORE.json AFTER.json

A case is slower if its median and its first quartile both grew by more than

    max(least, 3 * sqrt(spread_before^2 + spread_after^2))      in log seconds,

where the spread of a case is the standard deviation of its samples, from their quartiles. The
spread is not divided by the root of the number of samples: load on a machine moves all samples of
a case together. The first quartile must agree because load slows some samples and hastens none.

A case is worse too if its peak memory grew by more than ``least``, if an error against float64
more than doubled (beyond 1e-6), or if it no longer ran. The exit status is 1 if anything is worse,
2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.result_files import ResultFile, Row, read

SIGMAS = 3.0
ERROR_FLOOR = 1e-6
SAME = ("cpu", "gpu", "threads")


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
    args = parser.parse_args(arguments)
    try:
        before, after = read(args.before), read(args.after)
        _same_hardware(before, after)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, versions in _changed_versions(before, after).items():
        print(f"note: {name} {versions[0]} -> {versions[1]}")
    old = {row.name: row for row in before.rows}
    new = {row.name: row for row in after.rows}
    failed = 0
    for name, row in old.items():
        worse = regressions(row, new.get(name), args.least)
        failed += bool(worse)
        if worse or args.all:
            print(
                f"{'WORSE' if worse else 'ok   '} {name}: {'; '.join(worse) or _change(row, new)}"
            )
    print(f"{failed} of {len(old)} cases worse, {len(new.keys() - old.keys())} new")
    return 1 if failed else 0


def regressions(before: Row, after: Row | None, least: float) -> list[str]:
    """What became worse, in words."""
    if after is None:
        return ["did not run"]
    found = []
    noise = SIGMAS * math.hypot(before.spread, after.spread)
    allowed = max(math.log1p(least), noise)
    slower = min(
        math.log(after.median / before.median),
        math.log(after.first_quartile / before.first_quartile),
    )
    if slower > allowed:
        found.append(f"{_times(slower)} slower, noise up to {_times(allowed)}")
    memory = before.info["peak_bytes"], after.info["peak_bytes"]
    if memory[1] > (1 + least) * memory[0] + 1024:
        found.append(f"peak memory {memory[0] / 2**20:.1f} -> {memory[1] / 2**20:.1f} MiB")
    errors = before.info["errors"] or {}, after.info["errors"] or {}
    for name, error in errors[0].items():
        if name in errors[1] and errors[1][name] > 2 * error + ERROR_FLOOR:
            found.append(f"error of {name} {error:.1e} -> {errors[1][name]:.1e}")
    return found


def _change(row: Row, new: dict[str, Row]) -> str:
    return f"{_times(math.log(new[row.name].median / row.median))} the time"


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
