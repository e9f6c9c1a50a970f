"""The published configurations, indices and tokenizer files, where they lie beside the project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT.parent / "shared" / "official"


def folder(name: str) -> Path:
    """That of a model; skips the test where there is none."""
    path = FOLDER / name
    if not path.is_dir():
        pytest.skip(f"the published files of {name} are not at ../shared/official")
    return path


def index_of(name: str) -> tuple[dict[str, str], int]:
    """Weight map and total size in bytes."""
    index: dict[str, Any] = json.loads((folder(name) / "model.safetensors.index.json").read_text())
    return index["weight_map"], int(index["metadata"]["total_size"])
