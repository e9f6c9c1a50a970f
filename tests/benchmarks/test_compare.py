from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import main
from tests.benchmarks.result_cases import benchmark, write


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ({}, {}, None),
        ({}, {"median": 1.04e-3}, None),  # below the least change
        ({}, {"median": 0.5e-3}, None),
        ({}, {"median": 1.3e-3}, "slower"),
        ({"spread": 0.2}, {"median": 1.3e-3}, None),
        ({}, {"median": 1.3e-3, "spread": 0.2}, None),
        ({"spread": 0.1}, {"median": 2e-3}, "slower"),
        ({}, {"peak_bytes": 2**21}, "peak memory"),
        ({}, {"peak_bytes": 2**20 + 512}, None),
        ({}, {"errors": {"entropy": 1e-4}}, "error of entropy"),
        ({}, {"errors": {"entropy": 2.5e-6}}, None),
        ({"errors": None}, {"errors": None}, None),
    ],
)
def test_what_is_worse(
    before: dict[str, Any],
    after: dict[str, Any],
    word: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [
        write(tmp_path / f"{place}.json", benchmark(**changes), benchmark(rows=8))
        for place, changes in enumerate((before, after))
    ]
    status = main([str(file) for file in files])
    output = capsys.readouterr().out
    assert status == (0 if word is None else 1), output
    assert ("WORSE" in output) == (word is not None)
    assert word is None or word in output
    assert f"{int(word is not None)} of 2 cases worse" in output


def test_load_that_slows_only_some_samples_is_no_regression(tmp_path: Path) -> None:
    entry = benchmark(median=1.5e-3)
    entry["stats"] |= {"q1": 1e-3, "q3": 1.51e-3}
    before = benchmark()
    before["stats"] |= {"q1": 1e-3, "q3": 1.001e-3}
    files = write(tmp_path / "a.json", before), write(tmp_path / "b.json", entry)
    assert main([str(file) for file in files]) == 0


@pytest.mark.parametrize(
    ("ours", "controls", "status"),
    [
        (2.0, (2.0, 2.1), 0),  # the machine is slower
        (2.0, (1.0, 1.02), 1),
        (1.0, (0.5, 0.51), 1),  # the machine is faster, and we are not
        (2.0, (1.0, 2.5), 0),  # nobody knows what the machine did
        (1.0, (1.5, 1.5), 0),
        (1.0, (), 0),
        (1.5, (), 1),
    ],
)
def test_other_implementations_are_controls(
    ours: float, controls: tuple[float, ...], status: int, tmp_path: Path
) -> None:
    names = ("eager", "TRL")[: len(controls)]
    before = [benchmark(), *(benchmark(name) for name in names)]
    changed = zip(names, controls, strict=True)
    after = [benchmark(median=1e-3 * ours), *(benchmark(n, 1e-3 * times) for n, times in changed)]
    files = write(tmp_path / "a.json", *before), write(tmp_path / "b.json", *after)
    assert main([str(file) for file in files]) == status


def test_a_case_that_no_longer_runs_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = write(tmp_path / "a.json", benchmark(), benchmark("egspo cpp"), benchmark("TRL"))
    one = write(tmp_path / "b.json", benchmark())
    assert main([str(both), str(one)]) == 1
    output = capsys.readouterr().out
    assert "egspo cpp: did not run" in output and "TRL" not in output
    assert main([str(one), str(both)]) == 0


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = write(tmp_path / "cpu.json", benchmark())
    gpu = write(tmp_path / "gpu.json", benchmark(), gpu="A GPU")
    assert main([str(cpu), str(gpu)]) == 2
    assert "gpu None and 'A GPU'" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text('{"benchmarks": []}')
    assert main([str(cpu), str(other)]) == 2
    assert "not a result file" in capsys.readouterr().err
    assert main([str(cpu), str(write(tmp_path / "none.json"))]) == 2
    assert "no result of the suite 'kernels'" in capsys.readouterr().err
    assert main([str(cpu), str(tmp_path / "absent.json")]) == 2


def test_controls_of_another_torch_do_not_speak_for_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        write(tmp_path / f"{speed}.json", benchmark(), benchmark("eager", 1e-3 / speed))
        for speed in (1, 2)
    ]
    assert main([str(file) for file in files]) == 1
    files[1].write_text(files[1].read_text().replace('"torch": "2.13.0"', '"torch": "2.14.0"'))
    assert main([str(file) for file in files]) == 0
    assert "note: torch 2.13.0 -> 2.14.0" in capsys.readouterr().out
