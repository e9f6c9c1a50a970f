"""Data sets by name on the hub, local folder or file, read through the ``datasets`` library.

A source is one string, ``PATH[/CONFIG][:SPLIT]``::

    openai/gsm8k/main:train      the configuration `main` of a data set on the hub
    ankner/math-500:test
    data/problems.parquet        also .jsonl, .json and .csv; a file is one split
    data/gsm8k/main:train        a local copy, or a folder that save_to_disk wrote

What exists locally wins over the hub. The split may be left out where there is only one. Data from
the hub is cached by ``datasets``, and found there when ``HF_HUB_OFFLINE=1``.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from egspo.tasks.columns import ColumnNames

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
"""One example of a data set, by column."""

_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")


def load_rows(source: str, columns: Mapping[str, Any] | None = None) -> list[Row]:
    """All rows of ``source``, with ``\\n`` for every end of line in a text.

    Args:
        source: see the module.
        columns: type by name of the columns to read, as :func:`checked` takes them. The ``str``
            columns of a CSV file are read as they are written there (``007``). None reads all
            columns, unchecked.

    Raises:
        FileNotFoundError: there is no such file, and it is no name of a data set on the hub.
        OSError: the hub, or the data set on it, cannot be reached, or is not cached when offline.
        ValueError: there is no such split or configuration, the file is malformed, or a column is
            missing or has a value of another type; naming all of these.
    """
    rows = raw_rows(source, columns)
    for number, row in enumerate(rows):
        try:
            checked(row, columns or {})
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    return rows


def raw_rows(
    source: str, columns: Mapping[str, Any] | None, names: ColumnNames | None = None
) -> list[Row]:
    """As :func:`load_rows`, without a look at the types.

    Args:
        source, columns: as there.
        names: what columns may be called in the source.
    """
    texts = [name for name, kind in (columns or {}).items() if kind is str]
    if names is not None:
        texts += [names.other(name) for name in texts]
    data = _only_split(source, _open(source, texts))
    if len(data) == 0:
        raise ValueError(f"{source} has no rows")
    if columns is not None:
        there = dict(zip(columns, columns, strict=True))
        there |= {} if names is None else names.of(data.column_names)
        missing = [own for own, name in there.items() if name not in data.column_names]
        if missing:
            hint = "" if names is None else "; the option `columns` maps names to those of the file"
            raise ValueError(
                f"{source} lacks the column{'s' * (len(missing) > 1)} "
                f"{', '.join(map(repr, missing))}; it has {data.column_names}{hint}"
            )
        data = data.select_columns(list(dict.fromkeys(there.values())))
    rows: list[Row] = [_universal_newlines(row) for row in data.to_list()]
    if columns is not None:
        rows = [{own: row[name] for own, name in there.items()} for row in rows]
    return rows


def checked(row: Row, columns: Mapping[str, Any]) -> Row:
    """The row, if its values are of the types of ``columns``.

    Types are ``str``, ``int``, ``float``, ``bool``, ``list[...]`` of these, unions, or ``Any``.

    Raises:
        ValueError: naming the column and the value that is another.
    """
    for name, kind in columns.items():
        if not _is_a(row[name], kind):
            raise ValueError(
                f"the column {name!r} is {_shown(row[name])}, expected {_KINDS.get(kind, kind)}"
            )
    return row


def _universal_newlines(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value
    if isinstance(value, list):
        return [_universal_newlines(item) for item in value]
    if isinstance(value, dict):
        return {name: _universal_newlines(item) for name, item in value.items()}
    return value


def split_source(source: str) -> tuple[str, str | None]:
    """Path and split of ``source``."""
    colons = [place for place, character in enumerate(source) if character == ":"]
    # The longest that exists; names on the hub have no colon, but `train[:100]` is a split.
    for end in (len(source), *reversed(colons)):
        if Path(source[:end]).expanduser().exists():
            path, split = source[:end], source[end + 1 :]
            break
    else:
        path, _, split = source.partition(":")
    if not path or (not split and path != source):
        raise ValueError(f"{source!r} is no data set: expected PATH or PATH:SPLIT")
    return path, split or None


def _open(source: str, texts: list[str]) -> Any:
    """What ``datasets`` makes of it: one split, or several by name."""
    path, split = split_source(source)
    where = Path(path).expanduser()
    if where.is_file():
        return _open_file(source, where, split, texts)
    if where.is_dir():
        if any((where / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _saved(source, where, split)
        return _load(source, str(where), None, split)
    if _has_configuration(where.parent, where.name):
        return _load(source, str(where.parent), where.name, split)
    if where.suffix in _FORMATS or not _HUB_NAME.fullmatch(path):
        raise FileNotFoundError(f"there is no file or folder {path}{_near(where)}")
    parts = path.split("/")
    return _load(source, "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split)


def _open_file(source: str, file: Path, split: str | None, texts: list[str]) -> Any:
    if file.suffix not in _FORMATS:
        raise ValueError(f"{file}: expected a file {', '.join(_FORMATS)}, or a folder")
    if file.stat().st_size == 0:  # which `datasets` reports as StopIteration
        raise ValueError(f"{file} is empty")
    options: dict[str, Any] = {"data_files": str(file)}
    if file.suffix == ".csv":
        options |= {"converters": dict.fromkeys(texts, str), "keep_default_na": False}
        options["encoding"] = "utf-8-sig"  # spreadsheets begin a file with a byte order mark
    return _load(source, _FORMATS[file.suffix], None, split, **options)


def _has_configuration(folder: Path, name: str) -> bool:
    """Whether a folder is a copy of a repository on the hub whose README names it."""
    readme = folder / "README.md"
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    return re.search(rf"^ *- config_name: *{re.escape(name)} *$", text, re.MULTILINE) is not None


def _saved(source: str, folder: Path, split: str | None) -> Any:
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(folder))
    splits = data if isinstance(data, DatasetDict) else {"train": data}
    if split is None:
        return data
    if split not in splits:
        raise ValueError(f"{source}: there is no split {split!r}; there are {sorted(splits)}")
    return splits[split]


def _load(source: str, path: str, config: str | None, split: str | None, **options: Any) -> Any:
    """``datasets.load_dataset``, with errors that name the source and say what to do."""
    import datasets
    import datasets.exceptions

    try:
        return datasets.load_dataset(path, config, split=split, **options)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        problem = f"{source} is no local file or folder, and {_hub_problem(path, error)}"
        raise OSError(problem) from error
    except Exception as error:  # each file format raises its own
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise ValueError(f"{source} has no rows") from error
        text = str(cause).strip().splitlines() or [type(cause).__name__]
        hint = ""
        if "Config name is missing" in text[0]:
            hint = f"; name one behind a slash: {path}/CONFIG"
        raise ValueError(f"cannot read {source}: {' '.join(text[:2])}{hint}") from error


def _hub_problem(path: str, error: Exception) -> str:
    from datasets import config

    if not config.HF_HUB_OFFLINE:
        return f"getting the data set {path!r} from the hub failed: {error}"
    return (
        f"the data set {path!r} is not in the cache {config.HF_DATASETS_CACHE}; offline mode is on "
        "(HF_HUB_OFFLINE or HF_DATASETS_OFFLINE): load it once without, or give a local copy"
    )


def _only_split(source: str, data: Any) -> Dataset:
    from datasets import Dataset

    if isinstance(data, Dataset):
        return data
    if len(data) != 1:
        raise ValueError(f"{source} has the splits {sorted(data)}: name one, {source}:SPLIT")
    (only,) = data.values()
    assert isinstance(only, Dataset)
    return only


_KINDS: dict[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def _is_a(value: object, kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, option) for option in get_args(kind))
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _shown(value: object) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({type(value).__name__})" if value is not None else "missing (null)"


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (no folder {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
