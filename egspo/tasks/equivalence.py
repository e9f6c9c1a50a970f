"""Whether two mathematical answers are equal, by ``math-verify`` in processes of their own.

``math-verify`` limits its time by signals, which only the main thread gets, and its algebra may
hang. Here a hanging comparison ends its process, counts as unequal, and the next goes on in a new
one.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from egspo.tasks.math_forms import EQUAL, decide, normalised, plain_number

MAX_LENGTH = 1000
"""Characters; a longer answer is unequal to anything but itself."""

READY = "ready"
"""What a worker says when it has started."""

_SECONDS = 5.0
_MEMORY = 2 << 30
_WORKERS = max(1, min(4, os.cpu_count() or 1))


def require_math_verify() -> None:
    """Raises ValueError, with what to install, where ``math-verify`` is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "task math needs math-verify, which is not installed: pip install 'egspo[math]'"
        )


def equivalent(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """For each (gold, answer), both LaTeX or plain: whether the answer is right.

    May be called from any thread. A comparison that takes over 5 seconds or 2 GiB is false.

    Raises:
        RuntimeError: ``math-verify`` cannot be started.
    """
    return [verdict == EQUAL for verdict in verdicts(pairs)]


def verdicts(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """As :func:`equivalent`, with the reason where an answer is not equal, or not taken."""
    outcomes: dict[tuple[str, str], str] = {}
    undecided: dict[tuple[str, str], tuple[str, str]] = {}
    for pair in pairs:
        if max(map(len, pair)) > MAX_LENGTH:
            outcomes[pair] = EQUAL if pair[0] == pair[1] else "too long"
            continue
        gold, answer = map(normalised, pair)
        verdict = decide(gold, answer)
        if verdict is None:
            undecided[pair] = gold, answer
        else:
            outcomes[pair] = verdict
    outcomes.update(zip(undecided, _ask(list(undecided.values())), strict=True))
    return [outcomes[pair] for pair in pairs]


def unreadable(golds: Sequence[str]) -> list[int]:
    """Places of the answers that can only be equal to themselves, character for character."""
    asked = {i: normalised(gold) for i, gold in enumerate(golds)}
    asked = {i: gold for i, gold in asked.items() if plain_number(gold) is None}
    replies = _ask([(gold, None) for gold in asked.values()])
    return [i for i, verdict in zip(asked, replies, strict=True) if verdict != EQUAL]


def _ask(questions: Sequence[tuple[str, str | None]]) -> list[str]:
    with ThreadPoolExecutor(_WORKERS) as threads:
        return list(threads.map(_decide, questions))


def _decide(pair: tuple[str, str | None]) -> str:
    workers = _workers(os.getpid())
    worker = workers.get()
    try:
        return worker.decide(pair)
    finally:
        workers.put(worker)


@functools.cache
def _workers(process: int) -> queue.SimpleQueue[_Worker]:
    """Those of ``process``: after a fork, parent and child must not share their pipes."""
    workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for _ in range(_WORKERS):
        workers.put(_Worker(_SECONDS, _MEMORY))
    return workers


class _Worker:
    """One process, started when it is first needed and again after it was ended."""

    def __init__(self, seconds: float, memory: int) -> None:
        self.limits = [str(seconds), str(memory)]
        self.process: subprocess.Popen[str] | None = None

    def decide(self, pair: tuple[str, str | None]) -> str:
        process = self.process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(pair) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:  # it was ended in between, by whomever
            line = ""
        if line.endswith("\n"):
            return str(json.loads(line))
        process.kill()
        process.wait()
        self.process = None
        return "took too long, or too much memory"

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "egspo.tasks.math_worker", *self.limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdout is not None
        if process.stdout.readline().strip() != READY:
            _, problem = process.communicate()
            raise RuntimeError(f"math-verify cannot be started: {problem.strip()[-1000:]}")
        self.process = process
        return process
