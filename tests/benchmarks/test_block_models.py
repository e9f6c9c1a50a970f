"""The counted table of docs/block_models.md."""

from __future__ import annotations

from pathlib import Path

from benchmarks.block_models import rows, table

PAGE = Path(__file__).parents[2] / "docs" / "block_models.md"


def test_the_page_has_todays_counts() -> None:
    page = PAGE.read_text("utf-8")
    for stepwise in (False, True):
        assert table(rows(stepwise=stepwise)) in page, "python -m benchmarks.block_models"


def test_what_blocks_save() -> None:
    full, _, sdar, _, llada2, apart, _ = rows(stepwise=False)
    assert full.columns["rollout"] / llada2.columns["rollout"] > 12
    assert full.columns["update"] / llada2.columns["update"] > 6
    assert apart.columns["update"] - sdar.columns["update"] == 7 * 200 - 140  # of padding
    assert full.columns["rollout"] / sdar.columns["rollout"] > 70
    assert llada2.flops["rollout"] < full.flops["rollout"] / 50  # and a tenth of the parameters
