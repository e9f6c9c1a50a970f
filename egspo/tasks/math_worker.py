"""A process that decides whether two answers are equal: ``python -m egspo.tasks.math_worker``.

It reads a JSON list ``[gold, answer]`` per line and answers ``true`` or ``false``. Symbolic algebra
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

from egspo.tasks.equivalence import READY


def main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    logging.disable()  # math-verify's warnings that its own time limits are off
    from math_verify import parse, verify

    @functools.lru_cache(maxsize=10_000)
    def equal(gold: str, answer: str) -> bool:
        try:
            parsed = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
            return bool(verify(*parsed, timeout_seconds=None))
        except Exception:  # also out of memory
            return False

    equal("\\frac{1}{2}", "0.5")  # imports the rest
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
        outcome = equal(gold, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(outcome), file=replies, flush=True)


if __name__ == "__main__":
    main()
