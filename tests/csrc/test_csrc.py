"""Builds the programs of this folder with sanitizers and runs them over fixed seeds."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)

pytestmark = [
    pytest.mark.slow,  # with sanitizers each takes a compiler ten seconds and more
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def build_and_run(program: Path, sources: list[Path], flags: list[str], cases: int) -> None:
    """Build ``program`` and run it on the seeds 0 to ``cases`` - 1; its error names the seed."""
    assert COMPILER is not None
    command = [*COMPILER.split(), "-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror"]
    command += ["-fno-sanitize-recover=all", f"-I{CSRC}", *flags, *map(str, sources)]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    ran = subprocess.run(
        [str(program), "0", str(cases)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{cases} cases passed\n"


def test_cpu_library_against_the_oracle(tmp_path: Path) -> None:
    sources = [HERE / "fuzz_select_steps.cpp", CSRC / "select_steps_cpu.cpp"]
    build_and_run(tmp_path / "fuzz", sources, ["-O1", "-fsanitize=address,undefined"], 5000)


def test_algorithm_of_the_cuda_library_against_the_oracle(tmp_path: Path) -> None:
    flags = ["-O0", "-fsanitize=address,undefined"]  # building at -O1 takes longer than it saves
    build_and_run(tmp_path / "fuzz", [HERE / "fuzz_block.cpp"], flags, 1000)


def test_algorithm_of_the_cuda_library_has_no_data_race(tmp_path: Path) -> None:
    flags = ["-O1", "-fsanitize=thread", "-DREAL_THREADS", "-pthread"]
    build_and_run(tmp_path / "fuzz", [HERE / "fuzz_block.cpp"], flags, 50)


SANITIZED = ["-O1", "-ffp-contract=fast", "-fsanitize=address,undefined"]


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_loops_over_rows_against_sums_in_double(lanes: int, tmp_path: Path) -> None:
    """Vectors of every width, of instructions that any processor of the platform has."""
    flags = [*SANITIZED, "-Wno-psabi", f"-DEGSPO_LANES={lanes}"]
    build_and_run(tmp_path / "check", [HERE / "check_rows.cpp"], flags, 100)


def has_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and {"avx2", "fma", "f16c"} <= set(cpuinfo.read_text().split())


@pytest.mark.skipif(not has_avx2(), reason="no AVX2")
def test_loops_over_rows_in_avx2(tmp_path: Path) -> None:
    flags = [*SANITIZED, "-mavx2", "-mfma", "-mf16c"]
    build_and_run(tmp_path / "check", [HERE / "check_rows.cpp"], flags, 100)


def test_functions_over_rows_have_no_data_race(tmp_path: Path) -> None:
    names = ("rows_cpu", "rows_sample", "rows_baseline", "rows_avx2", "rows_avx512")
    sources = [HERE / "threads_rows.cpp", *(CSRC / f"{name}.cpp" for name in names)]
    # The wider loops are compiled as the baseline here: what is tested is who writes what when.
    flags = ["-O1", "-ffp-contract=fast", "-fsanitize=thread", "-pthread"]
    build_and_run(tmp_path / "threads", sources, flags, 3)
