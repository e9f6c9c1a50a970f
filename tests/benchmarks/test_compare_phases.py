"""Comparing whole iterations: what is a regression of a phase, and what is the machine."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import main
from tests.benchmarks.result_cases import benchmark, write

PHASES = {
    "rollout": {"seconds": 0.5, "flops": 4_000_000, "peak_bytes": 20_000_000},
    "select": {"seconds": 0.0005, "flops": 0, "peak_bytes": 7000},
    "update": {"seconds": 0.2, "flops": 2_000_000, "peak_bytes": 13_000_000},
}


def iteration(implementation: str, spread: float = 0.01, **changes: float) -> dict[str, Any]:
    """An entry of the suite; ``changes``: factors by ``phase_quantity``."""
    phases = copy.deepcopy(PHASES)
    for name, factor in changes.items():
        phase, _, quantity = name.partition("_")
        phases[phase][quantity] *= factor
    half = 1.349 * spread / 2
    return {
        "group": "iteration, egspo-sa, small",
        "stats": {"median": 0.7, "q1": 0.7 * (1 - half), "q3": 0.7 * (1 + half)},
        "extra_info": {
            "suite": "iteration",
            "implementation": implementation,
            "problem": {"layers": 2},
            "device": "cpu",
            "phases": phases,
        },
    }


def scaling(implementation: str, **changes: float) -> dict[str, Any]:
    """An entry with two sizes; changes are of the larger."""
    points = []
    for multiple in (1, 2):
        for phase, costs in (*PHASES.items(), ("iteration", PHASES["rollout"])):
            point = {"axis": "K", "multiple": multiple, "phase": phase}
            point |= {name: value * multiple for name, value in costs.items()}
            for name, factor in changes.items():
                changed, _, quantity = name.partition("_")
                if multiple == 2 and changed == phase:
                    point[quantity] *= factor
            points.append(point)
    return {
        "group": "scaling, K",
        "stats": {"median": 3.0, "q1": 3.0, "q3": 3.0},
        "extra_info": {
            "suite": "scaling",
            "implementation": implementation,
            "base": {"layers": 1},
            "device": "cpu",
            "points": points,
        },
    }


def compared(folder: Path, before: list[Any], after: list[Any], *options: str) -> int:
    files = write(folder / "a.json", *before), write(folder / "b.json", *after)
    return main([*map(str, files), *options])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, None),
        ({"update_seconds": 1.04}, None),  # below the least change
        ({"update_seconds": 0.5}, None),
        ({"update_seconds": 1.4}, "slower"),
        ({"select_seconds": 3.0}, None),  # too short to be timed
        ({"rollout_flops": 1.0005}, None),
        ({"rollout_flops": 1.01}, "FLOPs"),
        ({"update_peak_bytes": 1.04}, None),
        ({"update_peak_bytes": 1.3}, "peak memory"),
        ({"select_peak_bytes": 1.1}, None),  # some bytes
    ],
)
@pytest.mark.parametrize("suite", [iteration, scaling])
def test_what_is_worse(
    suite: Any,
    changes: dict[str, float],
    word: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = [suite("egspo"), suite("baseline")]
    status = compared(tmp_path, both, [suite("egspo", **changes), suite("baseline")])
    output = capsys.readouterr().out
    assert status == (0 if word is None else 1), output
    assert word is None or word in output
    if word is not None:
        phase = next(iter(changes)).partition("_")[0]
        assert any(f", {phase}: " in line for line in output.splitlines()), output


@pytest.mark.parametrize(
    ("ours", "control", "status"),
    [
        (2.0, {"rollout_seconds": 2.0, "update_seconds": 2.0}, 0),  # the machine is slower
        (2.0, {}, 1),
        (1.0, {"rollout_seconds": 0.5, "update_seconds": 0.5}, 1),  # it is faster, and we are not
        (2.0, {"rollout_seconds": 3.0}, 0),  # nobody knows what the machine did
    ],
)
def test_the_plain_implementation_is_the_control(
    ours: float, control: dict[str, float], status: int, tmp_path: Path
) -> None:
    before = [iteration("egspo"), iteration("baseline")]
    changed = iteration("egspo", rollout_seconds=ours, update_seconds=ours)
    assert compared(tmp_path, before, [changed, iteration("baseline", **control)]) == status


def test_rounds_that_spread_allow_for_more(tmp_path: Path) -> None:
    before = [iteration("egspo", spread=0.2)]
    assert compared(tmp_path, before, [iteration("egspo", 0.2, update_seconds=1.4)]) == 0
    assert compared(tmp_path, before, [iteration("egspo", 0.2, update_seconds=3.0)]) == 1


def test_a_phase_that_no_longer_runs_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = iteration("egspo")
    del after["extra_info"]["phases"]["update"]
    assert compared(tmp_path, [iteration("egspo")], [after]) == 1
    assert "iteration, egspo-sa, small, update: did not run" in capsys.readouterr().out
    only = iteration("egspo") | {"group": "iteration, egspo, small"}
    assert compared(tmp_path, [iteration("egspo")], [only]) == 1


def test_other_sizes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = iteration("egspo")
    after["extra_info"]["problem"] = {"layers": 3}
    assert compared(tmp_path, [iteration("egspo")], [after]) == 2
    assert "measured at other sizes" in capsys.readouterr().err


def test_suites_are_those_of_the_first_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [iteration("egspo"), benchmark()]
    worse = [iteration("egspo", update_seconds=3.0), benchmark()]
    assert compared(tmp_path, both, worse) == 1
    assert "2 of 5 cases worse" in capsys.readouterr().out
    assert compared(tmp_path, both, worse, "--suites", "kernels") == 0
    assert compared(tmp_path, both, [benchmark()]) == 2
    assert "no result of the suite 'iteration'" in capsys.readouterr().err
    assert compared(tmp_path, [benchmark()], worse) == 0
