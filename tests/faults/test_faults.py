"""Killed anywhere, any number of times, and started again by the same command: nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import SCENARIOS, run_faults

KILLS = 200


def test_one_kill_of_each_kind(tmp_path: Path) -> None:
    """The harness itself, in what is fast."""
    reports = run_faults(tmp_path, 2, 1, names=["train", "sft"])
    for report in reports.values():
        assert not report.failures and report.kills >= 1 and report.ended >= 1


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    reports = run_faults(tmp_path, KILLS, 0)
    assert not [failure for report in reports.values() for failure in report.failures]
    assert sum(report.kills for report in reports.values()) >= KILLS
    assert reports.keys() == SCENARIOS.keys()
