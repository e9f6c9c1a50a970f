"""What data a run has: kept in its folder, so that it goes on with no other by accident."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from egspo.config import TrainConfig
from egspo.files import CheckpointError, replacing
from egspo.tasks import Example, Task

logger = logging.getLogger("egspo")

DATA_FILE = "data.json"

Identity = dict[str, dict[str, Any]]
"""Of each split: how many examples, and digests of what is in them."""


def data_identity(task: Task, train: Sequence[Example] | None = None) -> Identity:
    """Of the examples to train on (those of ``task`` by default) and the held-out ones."""
    return {
        "training": _split(task.train if train is None else train),
        "held-out": _split(task.validation or task.test),
    }


def _split(examples: Sequence[Example]) -> dict[str, Any]:
    prompts = [_text([example.prompt, example.prefill]) for example in examples]
    return {
        "examples": len(examples),
        "prompts": _digest(prompts),
        "sorted": _digest(sorted(prompts)),
        "columns": _digest(_text(example.columns) for example in examples),
        "targets": _digest(_text(example.target) for example in examples),
    }


def _text(content: object) -> str:
    return json.dumps(content, sort_keys=True, default=lambda value: type(value).__name__)


def _digest(texts: Iterable[str]) -> str:
    state = hashlib.sha256()
    for text in texts:
        state.update(text.encode() + b"\n")
    return state.hexdigest()[:16]


def save_data_identity(folder: Path, identity: Identity) -> None:
    """Into the folder of a run."""
    with replacing(folder / DATA_FILE) as temporary:
        temporary.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")


def check_same_data(config: TrainConfig, identity: Identity, run: Path) -> None:
    """Whether ``run`` had the same data.

    Raises:
        CheckpointError: naming what differs, unless ``allow_changed_data`` allows it.
    """
    file = run / DATA_FILE
    if not file.is_file():
        logger.warning("%s has no %s: whether its data was the same is not known", run, DATA_FILE)
        return
    try:
        saved = json.loads(file.read_text("utf-8"))
        changed = _differences(saved, identity)
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error!r}): remove it to go on without"
        ) from error
    if not changed:
        return
    text = f"the data is not that of {run}: {'; '.join(changed)}"
    if not config.allow_changed_data:
        raise CheckpointError(f"{text}. allow_changed_data=true goes on all the same")
    logger.warning("%s (allow_changed_data)", text)


def _differences(saved: Mapping[str, Any], now: Identity) -> list[str]:
    changed = []
    for split, new in now.items():
        old = saved[split]
        if old["examples"] != new["examples"]:
            changed.append(f"{old['examples']} {split} examples, now {new['examples']}")
        elif old["sorted"] != new["sorted"]:
            changed.append(f"other {split} prompts")
        elif old["prompts"] != new["prompts"]:
            changed.append(f"the {split} examples in another order")
        else:
            if old["columns"] != new["columns"]:
                changed.append(f"other columns, which rewards are given, of {split} examples")
            if old["targets"] != new["targets"]:
                changed.append(f"other targets of {split} examples")
    return changed
