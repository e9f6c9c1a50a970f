"""Data sets from files, folders and the hub's cache, and what is said when they are wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from egspo.tasks.data import load_rows, split_source

ROWS = [{"question": f"What is {i}?", "answer": str(i), "nums": [i, i + 1]} for i in range(4)]
COLUMNS = {"question": str, "answer": str, "nums": list[int]}
README = """\
---
configs:
- config_name: main
  data_files: [{split: train, path: main/train-*}, {split: test, path: main/test-*}]
- config_name: socratic
  data_files: [{split: train, path: socratic/train-*}]
---
"""


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows)).to_parquet(str(path))
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("a.json", write_json), ("a.parquet", write_parquet)],
)
def test_files(tmp_path: Path, name: str, write: Callable[[Path], Path]) -> None:
    file = write(tmp_path / name)
    assert load_rows(str(file), COLUMNS) == ROWS
    assert load_rows(f"{file}:train") == ROWS
    assert load_rows(str(file), {"answer": str}) == [{"answer": str(i)} for i in range(4)]


def test_text_columns_of_csv_are_read_as_written(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('question,answer,n\nNA,007,1\n"a, ""b""",1e3,2\né,,3\n', encoding="utf-8-sig")
    columns = {"question": str, "answer": str, "n": int}
    assert load_rows(str(file), columns) == [
        {"question": "NA", "answer": "007", "n": 1},
        {"question": 'a, "b"', "answer": "1e3", "n": 2},
        {"question": "é", "answer": "", "n": 3},
    ]


def test_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_jsonl(tmp_path / "plain" / f"{split}.jsonl", ROWS[: 1 + (split == "train")])
    assert len(load_rows(f"{tmp_path}/plain:train")) == 2
    assert load_rows(f"{tmp_path}/plain:test", COLUMNS) == ROWS[:1]
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]: name one, .*:SPLIT"):
        load_rows(f"{tmp_path}/plain")
    with pytest.raises(ValueError, match='plain:dev: Unknown split "dev"'):
        load_rows(f"{tmp_path}/plain:dev")


def test_a_copy_of_a_repository_has_its_configurations(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name, count in (("main/train", 4), ("main/test", 1), ("socratic/train", 2)):
        write_parquet(copy / f"{name}-00000-of-00001.parquet", ROWS[:count])
    (copy / "README.md").write_text(README)
    assert load_rows(f"{copy}/main:train", COLUMNS) == ROWS
    assert len(load_rows(f"{copy}/main:test")) == 1
    shutil.move(copy / "socratic", copy / "other")
    (copy / "README.md").write_text(README.replace("socratic/", "other/"))
    assert len(load_rows(f"{copy}/socratic")) == 2
    with pytest.raises(ValueError, match=r"'main', 'socratic'.*name one behind a slash: .*/CONFIG"):
        load_rows(f"{copy}:train")
    with pytest.raises(FileNotFoundError, match=r"copy/maim; did you mean .*copy/main\?"):
        load_rows(f"{copy}/maim:train")


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    assert load_rows(f"{tmp_path}/one", COLUMNS) == load_rows(f"{tmp_path}/one:train") == ROWS
    assert load_rows(f"{tmp_path}/two:test", COLUMNS) == ROWS[:1]
    with pytest.raises(ValueError, match=r"no split 'dev'; there are \['test', 'train'\]"):
        load_rows(f"{tmp_path}/two:dev")


def test_offline_the_cache_is_read(tmp_path: Path, dataset_cache: Path) -> None:
    """The layout in which ``datasets`` keeps ``openai/gsm8k`` after a download."""
    write_parquet(tmp_path / "train.parquet")
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"))
    (info,) = (dataset_cache / "parquet").rglob("dataset_info.json")
    target = dataset_cache / "openai___gsm8k" / "main" / "0.0.0" / ("0" * 40)
    target.parent.mkdir(parents=True)
    shutil.copytree(info.parent, target)
    described = json.loads((target / "dataset_info.json").read_text())
    described |= {"dataset_name": "gsm8k", "config_name": "main"}
    (target / "dataset_info.json").write_text(json.dumps(described))
    (target / "parquet-train.arrow").rename(target / "gsm8k-train.arrow")
    assert data["train"].num_rows == 4
    assert load_rows("openai/gsm8k/main:train", COLUMNS) == ROWS


@pytest.mark.parametrize("source", ["openai/gsm8k/main:train", "ankner/math-500:test"])
def test_offline_and_not_cached(source: str) -> None:
    message = f"^{source} is no local file or folder, and .*offline mode is on.*local copy"
    with pytest.raises(OSError, match=message):
        load_rows(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data/trian.jsonl", r"no file or folder .*trian.jsonl; did you mean .*train.jsonl"),
        ("missing/train.jsonl", r"no file or folder .* \(no folder .*missing\)"),
        ("data/x y", "no file or folder"),
        ("data/trian:train", "no file or folder .*data/trian; did you mean"),
    ],
)
def test_missing_files(tmp_path: Path, source: str, message: str) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl")
    (tmp_path / "data" / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        load_rows(f"{tmp_path}/{source}")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"question": str, "gold": str, "level": int},
            r"a.jsonl lacks the columns 'gold', 'level'; it has \['question', 'answer', 'nums'\]",
        ),
        ({"solution": str}, r"a.jsonl lacks the column 'solution'"),
        ({"answer": int}, r"a.jsonl, row 0: the column 'answer' is '0' \(str\), expected an int"),
        ({"nums": list[str]}, r"'nums' is \[0, 1\] \(list\), expected list\[str\]"),
        ({"nums": str}, r"'nums' is \[0, 1\] \(list\), expected a string"),
    ],
)
def test_schema(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=message):
        load_rows(str(file), columns)


def test_kinds_of_columns(tmp_path: Path) -> None:
    rows = [
        {"a": 1, "b": True, "c": 1.5, "d": {"x": [1]}, "e": "x"},
        {"a": 2, "b": False, "c": 2.0, "d": None, "e": None},
    ]
    file = str(write_jsonl(tmp_path / "a.jsonl", rows))
    kinds = {"a": float, "b": bool, "c": float, "d": Any, "e": str | None}
    assert load_rows(file, kinds) == rows
    for name, kind in (("b", int), ("c", int), ("e", str)):
        with pytest.raises(ValueError, match=f"row [01]: the column '{name}' is .*, expected"):
            load_rows(file, {name: kind})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"', "cannot read .*a.jsonl"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.json", b"[]", "a.json"),
        ("a.parquet", b"PK\x03\x04", "cannot read .*a.parquet"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "cannot read .*a.csv"),
        ("a.csv", b"a,b\n", "a.csv has no rows"),
        ("a.xlsx", b"x", r"a.xlsx: expected a file .parquet, .jsonl, .json, .csv, or a folder"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


def test_a_bare_name_is_no_hub_name() -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder gsm8k"):
        load_rows("gsm8k:train")


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="doesn't contain any data files"):
        load_rows(f"{tmp_path}/empty:train")


def test_sources(tmp_path: Path) -> None:
    assert split_source("openai/gsm8k/main:train") == ("openai/gsm8k/main", "train")
    assert split_source("a.jsonl") == ("a.jsonl", None)
    write_jsonl(tmp_path / "a:b.jsonl")
    assert split_source(f"{tmp_path}/a:b.jsonl") == (f"{tmp_path}/a:b.jsonl", None)
    assert split_source(f"{tmp_path}/a:b.jsonl:train") == (f"{tmp_path}/a:b.jsonl", "train")
    assert len(load_rows(f"{tmp_path}/a:b.jsonl:train[:2]")) == 2
    assert split_source("a/b:train[:2]") == ("a/b", "train[:2]")
    for bad in (":train", "a:", ""):
        with pytest.raises(ValueError, match="expected PATH or PATH:SPLIT"):
            split_source(bad)
