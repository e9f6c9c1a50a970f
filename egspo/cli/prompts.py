"""Prompts of ``egspo generate``: from the command line, plain lines or JSONL."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from egspo.files import read_user_text

OUTPUT_KEYS = ("index", "completion", "finish_reason", "tokens", "generation", "step_map")
"""Keys of a line of JSONL output that the input may not have."""


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    messages: list[dict[str, str]]
    record: dict[str, Any] = field(default_factory=dict)
    """What the output repeats of it: ``prompt`` or ``messages``, and all other keys."""

    @classmethod
    def from_text(cls, text: str) -> Prompt:
        return cls([{"role": "user", "content": text}], {"prompt": text})

    @property
    def title(self) -> str:
        """The last message."""
        return self.messages[-1]["content"]


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Of the options ``prompt``, ``prompts`` and ``prompts_format``.

    Raises:
        OSError: the file cannot be read.
        ValueError: there are no prompts, or a line is wrong, which is named.
    """
    prompts = [Prompt.from_text(text) for text in args.prompt]
    if args.prompts is not None:
        text = read_user_text(args.prompts)
        name = "standard input" if args.prompts == "-" else args.prompts
        jsonl = is_jsonl(args.prompts_format, args.prompts)
        lines = [
            (number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()
        ]
        prompts += [
            _parse(line, f"{name}, line {number}") if jsonl else Prompt.from_text(line)
            for number, line in lines
        ]
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT, or --prompts FILE with one per line")
    return prompts


def is_jsonl(choice: str, file: str | Path | None) -> bool:
    """Whether ``auto``, ``text`` or ``jsonl`` means JSONL for ``file``."""
    if choice == "auto":
        return file is not None and Path(file).suffix in (".jsonl", ".ndjson")
    return choice == "jsonl"


def _parse(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # as it will be written
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    except (RecursionError, UnicodeEncodeError, ValueError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with prompt or messages, got {line[:60]}")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError(
            f"{where}: expected exactly one of the keys prompt and messages, got {sorted(record)}"
        )
    taken = sorted(set(OUTPUT_KEYS) & set(record))
    if taken:
        raise ValueError(f"{where} has the keys {taken}, which the output needs: rename them")
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not record["prompt"].strip():
            raise ValueError(f"{where}: prompt must be a text, got {record['prompt']!r}")
        return Prompt([{"role": "user", "content": record["prompt"]}], record)
    _check_messages(record["messages"], where)
    return Prompt(record["messages"], record)


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: messages must be a list of messages, got {messages!r}")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f"{where}: a message must have the texts role and content, got {message!r}"
            )
