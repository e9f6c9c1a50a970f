"""Chat templates, which are programs of whoever made the model: bounded in time and length."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""That one prompt may take; real templates take a millisecond."""
CHARACTERS = 20_000_000
"""Of one prompt, rendered."""


def render_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Mapping[str, Any]]],
    *,
    add_generation_prompt: bool,
) -> list[str]:
    """``chats`` by the chat template of ``tokenizer``.

    What is a single operation is not ended however long it takes, as a power of huge numbers.

    Raises:
        ValueError: the template fails, or takes longer or says more than any prompt does.
    """
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
    texts: list[str] = []
    try:
        with _TimeLimit(SECONDS) as limit:
            for chat in chats:
                limit.begin()
                plain = [dict(message) for message in chat]
                text = str(tokenizer.apply_chat_template(plain, **options))
                if len(text) > CHARACTERS:
                    raise ValueError(f"it says {len(text):,} characters, at most {CHARACTERS:,}")
                texts.append(text)
    except _TimeIsUpError:
        problem, cause = f"it takes longer than {SECONDS:g} s", None
    except Exception as error:  # a program may fail in any way
        problem, cause = f"{type(error).__name__}: {error}", error
    else:
        return texts
    raise ValueError(
        f"the chat template of {tokenizer.name_or_path!r} does not take prompt {len(texts)}: "
        f"{problem}"
    ) from cause


class _TimeIsUpError(Exception):
    """Raised inside a template."""


class _TimeLimit:
    """Ends Python code of this thread that has gone on for ``seconds`` since :meth:`begin`.

    Any thread may do that, where a signal's alarm is the main thread's alone.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock, self._stop = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        self._thread = ctypes.c_ulong(threading.get_ident())
        self.begin()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def begin(self) -> None:
        self._deadline = time.monotonic() + self._seconds

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stop.set()
            _raise_in(self._thread, None)  # one on its way must not arrive later

    def _watch(self) -> None:
        left = self._seconds
        while left > 0:
            if self._stop.wait(left):
                return
            left = self._deadline - time.monotonic()
        with self._lock:
            if not self._stop.is_set():
                _raise_in(self._thread, _TimeIsUpError)


def _raise_in(thread: ctypes.c_ulong, error: type[Exception] | None) -> None:
    what = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, what)
