"""Model folders that somebody else made: what is in them is looked at before it is loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

_LARGEST_JSON = 200 * 2**20
_READ = (
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def check_folder(path_or_id: str | os.PathLike[str]) -> None:
    """Look at the files of a local folder, without loading their content.

    Raises:
        ValueError: names a file that is none (a pipe, a device, a broken link, a folder), is not
            JSON, or is a file of weights whose header cannot be read.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if not weights and file.name not in _READ:
            continue
        if not file.is_file():
            raise ValueError(f"{file} is no regular file")
        if file.suffix == ".json":
            _check_json(file)
        elif file.suffix == ".safetensors":
            _check_header(file)


@contextmanager
def readable(path_or_id: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, what a library raises of a damaged file becomes a ValueError that names the folder.

    Memory that is not there, and what is missing on this machine, stay what they are.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError, NotImplementedError):
        raise
    except Exception as error:
        if "out of memory" in str(error):
            raise
        raise ValueError(
            f"{os.fspath(path_or_id)} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _check_json(file: Path) -> None:
    if file.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{file} is larger than {_LARGEST_JSON // 2**20} MiB")
    try:
        json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as stored:
            stored.keys()
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or was not written to its end: {error}") from error


def check_amount(folder: str | os.PathLike[str], described: int) -> None:
    """Refuse a configuration that describes many times what its files of weights hold.

    What is missing would be made first, and only then be found missing.

    Args:
        folder: with files of safetensors; others are not looked at.
        described: parameters of the model in the configuration.

    Raises:
        ValueError: says both numbers.
    """
    found = 0
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                found += math.prod(stored.get_slice(name).get_shape())
    if found and described > 2 * found + 1_000_000:
        raise ValueError(
            f"{os.fspath(folder)}: config.json describes a model of {described:,} parameters, its "
            f"files hold {found:,}"
        )
