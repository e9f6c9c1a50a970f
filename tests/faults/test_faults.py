"""Killed anywhere, any number of times, and started again by the same command: nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import SCENARIOS, run_faults

KILLS = 200


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    reports = run_faults(tmp_path, KILLS, 0)
    assert not [failure for report in reports.values() for failure in report.failures]
    assert sum(report.kills for report in reports.values()) >= KILLS
    assert reports.keys() == SCENARIOS.keys()
