"""What runs in the sandbox cost, and how many a second there are: ``benchmarks/sandbox.py``.

For each runner: milliseconds of one run after the other, with one test and with ten, and programs a
second by workers. The server's start is not in them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

from egspo.sandbox import SandboxPool, make_backend


def programs(tests: int, count: int, tag: str) -> list[tuple[str, str]]:
    """Different right programs, with so many tests each."""
    source = "from solution import f\n" + "".join(
        f"def test_{number}(): assert f({number}) == {number}\n" for number in range(tests)
    )
    return [(f"def f(x): return x  # {tests} {number} {tag}", source) for number in range(count)]


def alone(pool: SandboxPool, tests: int, runs: int) -> tuple[float, float]:
    """Milliseconds, the median, and those of processor time, the mean."""
    taken, used = [], cpu_seconds(os.getpid())
    for program in programs(tests, runs, "alone"):
        start = time.perf_counter()
        assert pool.run(*program).score == 1.0
        taken.append(time.perf_counter() - start)
    used = cpu_seconds(os.getpid()) - used
    return 1e3 * statistics.median(taken), 1e3 * used / runs


def cpu_seconds(pid: int) -> float:
    """Of a process, those that it has started, and those of them that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task").glob("*/children")
    ticks = sum(map(int, fields[11:15]))  # utime, stime, cutime and cstime
    own = ticks / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for c in children for child in c.read_text().split())


def throughput(pool: SandboxPool, tests: int, runs: int) -> float:
    """Programs a second, with servers that run already."""
    for tag in ("warm", "measured"):
        jobs = programs(tests, runs if tag == "measured" else 2 * pool.workers, tag)
        start = time.perf_counter()
        verdicts = pool.run_many(jobs)
        taken = time.perf_counter() - start
        assert all(verdict.score == 1.0 for verdict in verdicts)
    return len(jobs) / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sandbox", default="bubblewrap", choices=["bubblewrap", "unsafe"])
    parser.add_argument("--runners", nargs="+", default=["separate", "pytest"])
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, nargs="+", default=[1, cores, 2 * cores])
    parser.add_argument("--runs", type=int, default=60)
    args = parser.parse_args()
    limits = {name: 60.0 for name in ("wall_seconds", "test_seconds")}
    print(f"{args.sandbox}, {cores} cores, Python {platform.python_version()}")
    for runner in args.runners:
        backend = make_backend(args.sandbox, runner=runner, limits=limits)
        backend.check()
        with SandboxPool(backend, workers=1) as pool:
            for tests in (1, 10):
                taken, used = alone(pool, tests, args.runs)
                print(
                    f"{runner:8s} {tests:2d} tests: {taken:6.1f} ms, of a processor {used:.1f} ms"
                )
        for workers in args.workers:
            with SandboxPool(backend, workers=workers) as pool:
                rate = throughput(pool, 3, args.runs)
            print(f"{runner:8s}  3 tests: {rate:6.1f} programs/s with {workers} workers")
        backend.close()


if __name__ == "__main__":
    main()
