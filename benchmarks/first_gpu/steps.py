"""The steps, in order of value."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

_GPU_TESTS = (
    "tests/kernels/test_cuda_selection.py",
    "tests/kernels/test_triton_stats.py",
    "tests/kernels/test_triton_surrogate.py",
    "tests/kernels/test_triton_linear.py",
    "tests/rollouts/test_graphs.py",
)


@dataclass(frozen=True)
class Step:
    """A command with its own time limit."""

    name: str
    purpose: str
    limit: float
    """Seconds."""
    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Of the process, with what this step adds."""
        return {**os.environ, **self.variables}


def steps(folder: Path, rehearse: bool) -> list[Step]:
    """What to run, results going to ``folder``."""
    python = sys.executable

    def measure(name: str, purpose: str, limit: float) -> Step:
        command = [python, "-m", "benchmarks.first_gpu.measure", name, "--folder", str(folder)]
        return step(name, purpose, limit, command + (["--rehearse"] if rehearse else []))

    def step(name: str, purpose: str, limit: float, command: list[str], **variables: str) -> Step:
        # What is rehearsed is the script: a slow processor is no failure.
        return Step(name, purpose, 10 * limit if rehearse else limit, command, variables)

    build = [python, "setup.py", "-q", "build_ext"]
    build += ["--build-lib", str(folder / "build")] if rehearse else ["--inplace"]
    chip = _no_chip() if rehearse else _chip()
    tests = ["tests/kernels/test_random.py"] if rehearse else ["-m", "gpu", *_GPU_TESTS]

    def iteration(name: str, purpose: str, limit: float, size: str, *tiny: str) -> Step:
        command = [python, "-m", "benchmarks.iteration", "--algorithms", "egspo-sa"]
        command += ["--repeats", "1", "--output", str(folder / f"{name}.json")]
        small = ["--size", "tiny", "--prompt-tokens", "8", "--new-tokens", "16", "--steps", "8"]
        sizes = [*small, *tiny] if rehearse else ["--size", size]
        return step(name, purpose, limit, [*command, *sizes])

    return [
        step("build", "the CUDA library for this chip", 90, build, **chip),
        measure("ceilings", "copy bandwidth and product rate", 40),
        measure("smoke", "every function against the reference", 60),
        step("tests", "tests marked gpu", 120, [python, "-m", "pytest", "-q", *tests]),
        measure("kernels", "times, memory and errors beside eager and the peers", 150),
        iteration("iteration", "EGSPO-SA beside plain research code", 180, "llada-8b"),
        iteration(
            "iteration-12",
            "12 completions, of which the public time is 95 s a step",
            120,
            "llada-8b-12",
            *("--group-size", "12"),
        ),
        iteration("iteration-dual", "with a dual cache", 90, "llada-8b-dual", "--cache", "dual"),
        iteration(
            "iteration-block-causal",
            "a block-causal model",
            90,
            "sdar-8b",
            *("--family", "sdar", "--block-length", "4"),
        ),
        measure("profile", "the kernel furthest from its floor", 40),
    ]


def _no_chip() -> dict[str, str]:
    # Whoever requires the CUDA library of an installation does not mean this one.
    return {"EGSPO_CUDA": "0", "EGSPO_REQUIRE_CUDA": "0", "CXXFLAGS": "-O0"}


def _chip() -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability()
    return {"EGSPO_CUDA_ARCHITECTURES": f"{major}{minor}", "EGSPO_REQUIRE_CUDA": "1"}
