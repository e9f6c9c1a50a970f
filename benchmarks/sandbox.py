"""What a run in the sandbox costs: ``python benchmarks/sandbox.py``."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import time

from egspo.sandbox import SandboxPool, make_backend


def measure(pool: SandboxPool, runs: int, tests: int) -> tuple[float, float, float]:
    """Milliseconds per run: the median of one after the other; all at once; and CPU time."""
    source = "from solution import f\n" + "".join(
        f"def test_{number}(): assert f({number}) == {number}\n" for number in range(tests)
    )
    programs = [f"def f(x): return x  # {tests} {number}" for number in range(2 * runs)]
    alone, used = [], cpu_seconds()
    for program in programs[:runs]:
        start = time.perf_counter()
        assert pool.run(program, source).score == 1.0
        alone.append(time.perf_counter() - start)
    start = time.perf_counter()
    verdicts = pool.run_many([(program, source) for program in programs[runs:]])
    together = (time.perf_counter() - start) / runs
    assert all(verdict.score == 1.0 for verdict in verdicts)
    cpu = (cpu_seconds() - used) / len(programs)
    return 1e3 * statistics.median(alone), 1e3 * together, 1e3 * cpu


def cpu_seconds() -> float:
    """Of the processes that have ended; not of those that the end of a sandbox killed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sandbox", default="bubblewrap", choices=["bubblewrap", "unsafe"])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=50)
    args = parser.parse_args()
    limits = {name: 60.0 for name in ("wall_seconds", "test_seconds")}
    print(f"{args.sandbox}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with SandboxPool(make_backend(args.sandbox, limits=limits), workers=args.workers) as pool:
        pool.backend.check()
        for tests in (1, 10):
            alone, together, cpu = measure(pool, args.runs, tests)
            print(
                f"{tests:2d} tests: {alone:5.1f} ms alone, "
                f"{together:5.1f} ms each with {args.workers} workers, {cpu:5.1f} ms of CPU time"
            )


if __name__ == "__main__":
    main()
