"""What trackers must know to go on with a run that they have seen before."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any

from egspo.files import replacing

WANDB_ID = "wandb_id"
"""File of a run that holds its id at W&B."""


def tracker_options(output: Path, resumed: Path | None) -> dict[str, Any]:
    """``init_kwargs`` of accelerate's trackers: W&B goes on with the run that it has.

    Args:
        output: folder of the run, which keeps the id.
        resumed: the run that is continued; in another folder it is another run at W&B too.
    """
    file = output / WANDB_ID
    known = _read(file) if resumed is not None and resumed.resolve() == output.resolve() else None
    identity = known or secrets.token_hex(4)
    with replacing(file) as temporary:
        temporary.write_text(identity, "utf-8")
    return {"wandb": {"id": identity, "resume": "allow"}}


def _read(file: Path) -> str | None:
    """What the file says, if that can be an id."""
    if not file.is_file():
        return None
    text = file.read_text("utf-8", errors="replace").strip()
    return text if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) else None
