"""What a borrowed GPU should do first, in eight minutes, each step within a limit of its own.

    python -m benchmarks.first_gpu                  # on a machine with a GPU
    python -m benchmarks.first_gpu --rehearse       # the same steps at tiny sizes, on a CPU

Results are written as they come, to one folder. A second call does what the first left: steps that
were finished are not repeated, and the kernel table goes on behind its last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.first_gpu.steps import Step, steps
from benchmarks.hardware import provenance

_ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: every step is done; 1: one failed, or the time was over."""
    args = _parser().parse_args(arguments)
    if not args.rehearse and not torch.cuda.is_available():
        print("first_gpu: torch finds no GPU; --rehearse runs the steps on a CPU", file=sys.stderr)
        return 2
    folder: Path = args.output
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "steps.json"
    done: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    end = time.monotonic() + args.budget
    chosen = [s for s in steps(folder, args.rehearse) if not args.steps or s.name in args.steps]
    for step in chosen:
        if done.get(step.name, {}).get("status") == "done":
            print(f"{step.name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < 5:
            print(f"{step.name}: no time left; call again", flush=True)
            continue
        done[step.name] = _run(step, min(step.limit, left), folder)
        done["provenance"] = provenance("python -m benchmarks.first_gpu")
        _write(record, done)
        print(f"{step.name}: {done[step.name]['status']}, {step.purpose}", flush=True)
    return 0 if all(done.get(s.name, {}).get("status") == "done" for s in chosen) else 1


def _run(step: Step, limit: float, folder: Path) -> dict[str, Any]:
    """Runs a step; its output goes to a file of its own."""
    started = time.monotonic()
    with (folder / f"{step.name}.log").open("w") as log:
        try:
            code = subprocess.run(
                step.command,
                cwd=_ROOT,
                env=step.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            ).returncode
            status = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
    seconds = round(time.monotonic() - started, 1)
    return {"status": status, "seconds": seconds, "command": step.command}


def _write(path: Path, content: dict[str, Any]) -> None:
    """All or nothing: the machine may go away at any time."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [step.name for step in steps(Path(), rehearse=True)]
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--steps", nargs="+", choices=names, help="only these")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all; default 480")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/first-gpu"))
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
