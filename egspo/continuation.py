"""Whether a run may be continued with a given configuration."""

from __future__ import annotations

from pathlib import Path

from egspo.checkpoint import CheckpointError
from egspo.config import TrainConfig
from egspo.recipe import config_to_dict, load_config

# What may differ without changing what the steps already made would have been.
_MAY_CHANGE = ("output_dir", "steps", "eval", "checkpoint", "trackers")


def check_continuation(config: TrainConfig, run: Path) -> None:
    """Compare ``config`` with the one saved by ``run``.

    Raises:
        CheckpointError: naming every option that differs and may not.
    """
    saved_file = run / "config.yaml"
    if not saved_file.is_file():
        raise CheckpointError(f"{run} has no config.yaml: it is not a run of egspo")
    saved, new = config_to_dict(load_config(saved_file)), config_to_dict(config)
    changed = [
        f"{name} was {saved.get(name)!r}, now {new.get(name)!r}"
        for name in sorted({*saved, *new})
        if name not in _MAY_CHANGE and saved.get(name) != new.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"the configuration differs from the one {run} was started with: " + "; ".join(changed)
        )
