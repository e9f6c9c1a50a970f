"""Whose the folder of a run is: nothing that this project did not write is replaced there."""

from __future__ import annotations

import os
from pathlib import Path

from egspo.config.recipe import TASK_COPY
from egspo.files import naming
from egspo.runs.checkpoint import CHECKPOINTS, list_checkpoints
from egspo.runs.published import NotOursError, check_ours

MARK = ".egspo-run"
"""File by which the folder of a run is known."""
PUBLISHED = ("base", "final")
_WRITTEN = (
    *PUBLISHED,
    CHECKPOINTS,
    "config.yaml",
    "curves.png",
    "metrics.jsonl",
    "samples",
    "samples.html",
    "sft_metrics.jsonl",
    TASK_COPY,
    "warm_start",
)


def claim(folder: Path) -> None:
    """Mark ``folder``, which exists, as that of a run.

    Raises:
        NotOursError: it has something where the run would write; nothing is touched.
    """
    check_run(folder)
    for name in PUBLISHED:
        check_ours(folder / name)
    mark = folder / MARK
    if os.path.lexists(mark) and not mark.is_file():
        raise NotOursError(f"{mark} is in the way, and egspo did not write it: move it away")
    if not mark.is_file():
        with naming(mark):
            mark.write_text("A run of egspo: it replaces what it wrote here, and nothing else.\n")


def check_run(folder: Path) -> None:
    """Raises :class:`NotOursError` where ``folder`` is no run and has what one would replace."""
    if (folder / MARK).is_file() or list_checkpoints(folder / CHECKPOINTS):
        return
    found = [name for name in _WRITTEN if os.path.lexists(folder / name)]
    if found:
        raise NotOursError(
            f"output_dir {folder} is no run of egspo and has {', '.join(found)}, which a run "
            "would replace: choose another output_dir, or move them away"
        )
