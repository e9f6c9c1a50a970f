"""Calls of users' reward functions: in parallel, with time limits, in threads that can be left."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import os
import threading
import time
from collections.abc import Mapping, Set
from concurrent.futures import Future
from typing import Any

from egspo.tasks.base import Reward

_LOOP_ANSWERS = 1.0
"""Seconds in which an event loop that nothing blocks runs a callback."""


class RewardTimeout(RuntimeError):
    """A call took longer than it may; whatever it still does goes unheard."""


class RewardCall:
    """One call of a reward function, which runs from now on in a thread of its own.

    The thread is a daemon: Python cannot end a function that hangs, but neither does it have to
    wait for one when it exits.
    """

    def __init__(self, reward: Reward, arguments: Mapping[str, Any]) -> None:
        self.reward = reward
        self._result: Future[Any] = Future()
        self._awaited: Future[Any] | None = None
        self._started = time.monotonic()
        context = contextvars.copy_context()
        threading.Thread(
            target=lambda: context.run(self._run, arguments),
            name=f"reward-{reward.name}",
            daemon=True,
        ).start()

    def result(self) -> Any:
        """What the function returned: a list, or else what cannot be made one.

        Raises:
            RewardTimeout: it takes longer than ``reward.timeout`` seconds.
            BaseException: what the function raised.
        """
        limit = self.reward.timeout
        remaining = None if limit is None else self._started + limit - time.monotonic()
        try:
            return self._result.result(remaining)
        except TimeoutError:
            if self._result.done():  # after all, or it is the function's own exception
                return self._result.result()
        if self._awaited is not None:
            self._awaited.cancel()
            _forget_blocked_loop()
        raise RewardTimeout(f"did not return within {limit:g} s")

    def _run(self, arguments: Mapping[str, Any]) -> None:
        try:
            result = self.reward.function(**arguments)
            if inspect.isawaitable(result):
                loop = _event_loop(os.getpid())
                self._awaited = asyncio.run_coroutine_threadsafe(_wait(result), loop)
                result = self._awaited.result()
            self._result.set_result(_listed(result))
        except BaseException as error:
            self._result.set_exception(error)


def _listed(result: Any) -> Any:
    # The items of these are no list of values, although `list` takes them.
    if isinstance(result, str | bytes | Mapping | Set) or not _is_iterable(result):
        return result
    return list(result)


def _is_iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:  # also a tensor without dimensions
        return False
    return True


async def _wait(result: Any) -> Any:
    return await result


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """An event loop in a thread, shared by all functions that are ``async def``.

    It is kept, because clients of network services are bound to the loop they were made in; but
    ``process`` is part of the key, because threads do not survive a fork.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"rewards-{process}", daemon=True).start()
    return loop


def _forget_blocked_loop() -> None:
    """A coroutine that never awaits blocks its loop for all others: the next gets a new one."""
    answered = threading.Event()
    _event_loop(os.getpid()).call_soon_threadsafe(answered.set)
    if not answered.wait(_LOOP_ANSWERS):
        _event_loop.cache_clear()
