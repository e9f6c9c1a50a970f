"""``python -m tests.faults --kills 2000``: random kills, and what held."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.harness import SCENARIOS, run_faults


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="at least (200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--jobs", type=int, default=3, metavar="N", help="scenarios at a time (3)")
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="(all)")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="egspo-faults-") as folder:
        reports = run_faults(
            Path(folder), args.kills, args.seed, names=args.scenario or (), jobs=args.jobs
        )
    print("| scenario | kills | starts | ended, compared | failures |\n|---|---|---|---|---|")
    for name, report in reports.items():
        print(
            f"| {name} | {report.kills} | {report.starts} | {report.ended} | "
            f"{len(report.failures)} |"
        )
    print(f"\n{time.monotonic() - start:.0f} s, seed {args.seed}")
    for report in reports.values():
        for failure in report.failures:
            print(f"\n{failure}", file=sys.stderr)
    return 1 if any(report.failures for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
