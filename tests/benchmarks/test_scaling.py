"""What grows and what stays flat as the sizes of an iteration grow; none of it is timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.iteration.measure import IMPLEMENTATIONS, Implementation
from benchmarks.iteration.problem import SIZES
from benchmarks.scaling.__main__ import main
from benchmarks.scaling.sweeps import AXES, Point, measure, problems, slope, slopes
from benchmarks.scaling.tables import described

BASE = replace(
    SIZES["tiny"],
    vocabulary=512,
    layers=1,
    prompt_tokens=4,
    new_tokens=8,
    steps=8,
    block_length=4,
    group_size=2,
    selected_steps=2,
    micro_batch=4,
    rollout_batch=2,
)


Points = dict[str, list[Point]]


def measured(axis: str, implementation: Implementation) -> tuple[Points, dict[str, dict[str, Any]]]:
    """The points, and their slopes, by phase."""
    points = measure(BASE, axis, (1, 2, 4), implementation, "egspo-sa", "cpu", 0)
    phases = dict.fromkeys(point.phase for point in points)
    return (
        {phase: [point for point in points if point.phase == phase] for phase in phases},
        {row["phase"]: row for row in slopes(points)},
    )


@pytest.mark.slow
def test_memory_of_the_rollout_is_bounded_by_its_batch() -> None:
    """Where the baseline stores a vocabulary of probabilities for every token of every sequence."""
    further = 3 * BASE.prompts * BASE.group_size
    stored = further * BASE.new_tokens * BASE.vocabulary * 4
    grown, slope_of = {}, {}
    for who in IMPLEMENTATIONS:
        points, found = measured("B", who)
        first, *_, last = points["rollout"]
        grown[who], slope_of[who] = last.peak_bytes - first.peak_bytes, found["rollout"]
        assert slope_of[who]["flops"] == pytest.approx(1, abs=0.01)
    assert abs(slope_of["egspo"]["peak_bytes"]) < 0.1
    assert grown["egspo"] < 0.05 * stored < stored <= grown["baseline"]


def test_rollout_grows_with_denoising_steps_and_training_with_selected_ones() -> None:
    (points, steps), (_, selected) = measured("T", "egspo"), measured("K", "egspo")
    # The head is at the tokens of a step, which halve as steps double; all else stays.
    one, two, four = (point.flops for point in points["update"])
    assert one - two == 2 * (two - four) > 0
    assert two - four < 0.25 * four
    assert 0.8 < steps["rollout"]["flops"] <= 1.0
    assert abs(steps["rollout"]["peak_bytes"]) < 0.1
    assert selected["rollout"]["flops"] == 0
    assert selected["update"]["flops"] == pytest.approx(1, abs=0.05)
    assert abs(selected["update"]["peak_bytes"]) < 0.1, "bounded by the micro-batch"
    assert selected["update"]["seconds"] is None


def test_slopes() -> None:
    def points(costs: list[int]) -> list[Point]:
        return [
            Point("K", 2**i, "egspo", "update", 0.0, cost, 5 * cost) for i, cost in enumerate(costs)
        ]

    assert slope(points([3, 6, 12]), "flops") == pytest.approx(1)
    assert slope(points([7, 7, 7]), "peak_bytes") == pytest.approx(0)
    assert slope(points([1, 4, 16]), "flops") == pytest.approx(2)
    assert slope(points([1, 2]), "seconds") is None
    assert [described(x) for x in (0.96, -0.04, 0.5, None)] == [
        "0.96 linear",
        "-0.04 flat",
        "0.50",
        "",
    ]


def test_every_axis_has_problems() -> None:
    for axis in AXES:
        first, second, third = problems(BASE, axis, (1, 2, 4))
        assert first != second != third
    assert [p.steps for p in problems(BASE, "T", (1, 2, 4))] == [2, 4, 8]
    with pytest.raises(ValueError, match="selected_steps"):
        problems(BASE, "K", (1, 8))


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scaling.json"
    options = ["--size", "tiny", "--multiples", "1", "2", "--repeats", "1"]
    main([*options, "--axes", "K", "--output", str(file)])
    record = json.loads(file.read_text())
    assert len(record["points"]) == 2 * 2 * 5 and len(record["slopes"]) == 2 * 5
    assert all(p["seconds"] > 0 and p["peak_bytes"] > 0 for p in record["points"])
    printed = capsys.readouterr().out
    assert printed.count("| K | selected steps |") == 4 and "0.00 flat" in printed
