from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import counted
from benchmarks.meter import PhaseCost
from benchmarks.report import main as report
from benchmarks.scaling.sweeps import Point, slopes
from tests.benchmarks.result_cases import write


def test_tables_go_between_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("traffic", "flops"):
        monkeypatch.setattr(counted, f"{name}_table", lambda name=name: f"| {name} |")
    document = tmp_path / "benchmarks.md"
    document.write_text("before\n<!-- counted:begin -->\nold\n<!-- counted:end -->\nafter\n")
    counted.main(["--write", "--document", str(document)])
    text = document.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "| traffic |\n\n| flops |" in text


def test_report_of_iterations_and_slopes(tmp_path: Path) -> None:
    def entry(suite: str, who: str, **info: object) -> dict[str, object]:
        stats = {"median": 1.0, "q1": 1.0, "q3": 1.0}
        info = {"suite": suite, "implementation": who, **info}
        return {"group": suite, "stats": stats, "extra_info": info}

    phases = {name: asdict(PhaseCost(2.0, 3 * 10**9, 10**6)) for name in ("rollout", "score")}
    phases |= {name: asdict(PhaseCost(0.5, 0, 4 * 10**6)) for name in ("select", "update")}
    shared = {"algorithm": "egspo", "size": "tiny", "problem": {"d_model": 16}, "phases": phases}
    points = [
        Point("V", multiple, who, phase, 0.0, 7 * multiple, 5)
        for who in ("egspo", "baseline")
        for phase in ("rollout", "score", "update", "iteration")
        for multiple in (1, 2)
    ]
    write(
        tmp_path / "any-name.json",
        *(entry("iteration", who, **shared, same_tokens=0.5) for who in ("egspo", "baseline")),
        entry("scaling", "egspo", base={"d_model": 16}, slopes=slopes(points)),
        ceilings=None,
    )
    (tmp_path / "of-the-command-line.json").write_text('{"rows": []}')
    document = tmp_path / "benchmarks.md"
    marks = [f"<!-- {n}:begin -->\n<!-- {n}:end -->\n" for n in ("kernels", "iteration", "scaling")]
    document.write_text("\n".join(marks))
    assert report(["--results", str(tmp_path), "--document", str(document)]) == 0
    text = document.read_text()
    assert "| egspo | iteration | 5 | 5 | 1.00 | 6 | 6 | 1.00 | 4 | 4 | 1.00 |" in text
    assert "Tokens that both rollouts agree on: 50.00 %." in text
    assert (
        "| V | vocabulary | rollout | 1.00 linear | 1.00 linear | 0.00 flat | 0.00 flat |" in text
    )
