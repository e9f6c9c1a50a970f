from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report import main, replace_section
from tests.benchmarks.result_cases import benchmark, write

DOCUMENT = "before\n<!-- kernels:begin -->\noutdated\n<!-- kernels:end -->\nafter\n"


def report(folder: Path, *options: str) -> int:
    document = folder / "benchmarks.md"
    if not document.exists():
        document.write_text(DOCUMENT)
    return main(["--results", str(folder), "--document", str(document), *options])


def test_committed_tables_are_those_of_the_committed_results() -> None:
    assert main(["--check"]) == 0


def test_tables_and_plots_of_a_gpu(tmp_path: Path) -> None:
    write(
        tmp_path / "kernels-gpu.json",
        benchmark(),
        benchmark("eager", 3e-3, errors=None),
        benchmark(rows=2048, median=4e-3),
        benchmark(function="select_steps", flops=0),
        gpu="A GPU",
    )
    assert report(tmp_path, "--check") == 1
    assert report(tmp_path) == 0
    assert report(tmp_path, "--check") == 0
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "outdated" not in text
    assert "### A GPU" in text and "0123456789ab" in text and "torch 2.13.0;" in text
    assert "| `token_stats forward 512x126464 bfloat16` | **1 ms** | 3 ms |" in text
    assert "egspo triton (graph) | 1 ms | 2 % | 77.5 % | 3100.00 | 77.5 % | 4.2 |" in text
    assert "did not fit" in text
    assert "| trl is not installed | 1 | token_stats (TRL) |" in text
    assert "9.0 after the run: other programs shared the machine" in text
    assert "without a GPU" not in text and "No GPU" not in text
    for kind in ("floor", "roofline"):
        name = f"benchmarks-kernels-gpu-{kind}.png"
        assert f"({name})" in text and (tmp_path / name).stat().st_size > 5000


def test_a_cpu_has_no_roofline_and_says_what_it_is(tmp_path: Path) -> None:
    write(tmp_path / "kernels-cpu.json", benchmark("egspo reference"), benchmark("eager", 2e-6))
    assert report(tmp_path) == 0
    text = (tmp_path / "benchmarks.md").read_text()
    assert "No GPU has run these yet" in text and "compares what runs without a GPU" in text
    assert "| 1 ms | **2 µs** |" in text
    assert [file.name for file in tmp_path.glob("*.png")] == ["benchmarks-kernels-cpu-times.png"]


def test_no_result_leaves_no_table(tmp_path: Path) -> None:
    assert report(tmp_path) == 0
    assert "|" not in (tmp_path / "benchmarks.md").read_text()


def test_a_document_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.md").write_text("no marks")
    assert report(tmp_path) == 2
    assert (tmp_path / "benchmarks.md").read_text() == "no marks"
    for wrong in (
        "<!-- x:end -->\n<!-- x:begin -->\n",
        "<!-- x:begin -->\n" * 2 + "<!-- x:end -->",
    ):
        with pytest.raises(ValueError, match="once each"):
            replace_section(wrong, "x", "body")
