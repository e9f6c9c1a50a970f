"""A process that decides whether two answers are equal: ``python -m egspo.tasks.math_worker``.

It reads a JSON list ``[gold, answer]`` per line and answers with a verdict as a JSON string, for
``[gold, null]`` whether it can be read. Symbolic algebra
can take for ever and any amount of memory on a short input, so the kernel ends the process: SIGALRM
with its default action also interrupts C code, and also when the parent is dead.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import signal
import sys

from math_verify import parse, verify

from egspo.tasks.equivalence import READY
from egspo.tasks.math_forms import EQUAL, UNEQUAL
from egspo.tasks.math_trees import are_close, first_expression, is_unevaluated


def _verdict(gold: str, answer: str | None) -> str:
    try:
        wanted = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
        expected = first_expression(wanted)
        if answer is None:
            return UNEQUAL if expected is None else EQUAL
        given = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        if not verify(wanted, given, timeout_seconds=None):
            return UNEQUAL
        found = first_expression(given)
        if expected is None or found is None:
            return EQUAL
        if not are_close(expected, found):
            return UNEQUAL
        if is_unevaluated(found) and not is_unevaluated(expected):
            return "arithmetic that is not carried out"
        return EQUAL
    except Exception:  # also out of memory
        return UNEQUAL


def main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    logging.disable()  # math-verify's warnings that its own time limits are off
    verdict = functools.lru_cache(maxsize=10_000)(_verdict)
    verdict("\\frac{x}{2}+1", "1+0.5x")  # imports the rest
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    print(READY, file=replies, flush=True)
    silence = os.open(os.devnull, os.O_WRONLY)  # parsers print what they cannot read
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        outcome = verdict(gold, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(outcome), file=replies, flush=True)


if __name__ == "__main__":
    main()
