"""``egspo export``: what a run trained, as one checkpoint in the official layout."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egspo.models import load_adapter, load_model, load_tokenizer
from egspo.runs.checkpoint import CHECKPOINTS, list_checkpoints
from egspo.runs.lock import alone
from egspo.runs.published import MANIFEST, publish, verify_published
from egspo.serving.named_model import GENERATION_FILE
from egspo.training.state import ADAPTER, WEIGHTS
from egspo.training.warm_start import BASE

_FILES = {ADAPTER: "adapter_config.json", WEIGHTS: "config.json"}


class ExportError(ValueError):
    """There is nothing to export, or its base is not known."""


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was written."""

    folder: Path
    base: str | None
    """What the adapter was merged into; None where all weights had been trained."""


def export(
    source: Path, output: Path, *, base: str | None = None, max_shard_size: str | None = None
) -> Exported:
    """Write the model that ``source`` trained to the new folder ``output``.

    An adapter is merged into its base, in the base's dtype; trained weights are copied. Tokenizer
    and decoding options come along. The folder appears complete, with checksums, or not at all.

    Args:
        source: a run, of which ``final`` counts, a checkpoint, or a folder with an adapter (PEFT)
            or a model.
        output: must not exist.
        base: folder or hub name of what the adapter was trained on; None for the ``base`` that the
            run kept, or else the name in the adapter's configuration.
        max_shard_size: of a file of merged weights; None for the default of save_pretrained.

    Raises:
        CheckpointError: a file of ``source``, or of the base that its run kept, is damaged.
        ExportError: ``source`` has neither adapter nor model, ``base`` is not known or cannot be
            loaded, or an option does not go with trained weights.
        FileExistsError: there is something at ``output``.
        RunLockedError: another process writes there.
        ValueError: adapter and base do not fit together.
    """
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists already, and nothing is overwritten")
    with alone(output, name="output"):
        return _export(source, output, base, max_shard_size)


def _export(source: Path, output: Path, base: str | None, max_shard_size: str | None) -> Exported:
    folder, kind = _trained(source)
    if (folder.parent / MANIFEST).is_file():
        verify_published(folder.parent)
    if kind == WEIGHTS:
        for name, value in (("base", base), ("max_shard_size", max_shard_size)):
            if value is not None:
                raise ExportError(f"{name} is for adapters: all weights of {folder} were trained")
        publish(output, lambda path: _copy(folder, path))
        return Exported(output, None)
    where, model = _base(folder, base)
    merged: Any = load_adapter(model, folder).merge_and_unload(safe_merge=True)
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder if own else where, merged.config)

    def write(path: Path) -> None:
        sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        merged.save_pretrained(path, **sizes)
        tokenizer.save_pretrained(path)
        if (folder / GENERATION_FILE).is_file():
            shutil.copy(folder / GENERATION_FILE, path)

    publish(output, write)
    return Exported(output, where)


def _trained(source: Path) -> tuple[Path, str]:
    """The folder of the adapter or model at ``source``, and which it is."""
    for folder in (source, source / "final"):
        for kind, file in _FILES.items():
            for candidate in (folder, folder / kind):
                if (candidate / file).is_file():
                    return candidate, kind
    checkpoints = list_checkpoints(source / CHECKPOINTS)
    if checkpoints:
        raise ExportError(
            f"{source} has no final model yet; its newest checkpoint is {checkpoints[-1]}: "
            "export that instead, or finish the run"
        )
    raise ExportError(
        f"{source} is no run, checkpoint, adapter or model: it has neither of "
        f"{', '.join(_FILES.values())}"
    )


def _base(adapter: Path, given: str | None) -> tuple[str, Any]:
    """Where the base of ``adapter`` is, and the base itself."""
    if given is not None:
        where = given
        if Path(given).is_dir():
            folder, kind = _trained(Path(given))
            if kind == ADAPTER:
                raise ExportError(f"base must be a model, {folder} is an adapter")
            where = str(folder)
        return where, load_model(where)
    for run in adapter.absolute().parents[:3]:  # RUN/final/adapter, RUN/checkpoints/STEP/adapter
        if (run / BASE / MANIFEST).is_file():
            verify_published(run / BASE)
            where = str(run / BASE / WEIGHTS)
            return where, load_model(where)
    file = adapter / _FILES[ADAPTER]
    recorded = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    if not recorded:
        raise ExportError(f"{file} does not say what the adapter was trained on: give base")
    try:
        return recorded, load_model(recorded)
    except FileNotFoundError as error:
        raise ExportError(
            f"the base that {file} names cannot be loaded: {error}; give base"
        ) from error


def _copy(folder: Path, path: Path) -> None:
    """The files of a model, without checksums that are of the folder they were in."""
    shutil.copytree(folder, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
