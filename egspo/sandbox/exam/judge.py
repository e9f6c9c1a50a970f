"""The verdict on a program from what its process reported, by the key that it never had."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from egspo.sandbox.exam.setting import Exam
from egspo.sandbox.exam.survey import Written
from egspo.sandbox.verdict import CaseResult, SandboxError, Verdict

_MAX_NAME = 200
_MAX_TEXT = 300
_TELLING = 8  # candidates: a wrong answer among fewer may be an honest mistake
_SUSPECT = 8  # values of which each is one of its candidates, most of them a wrong one


class Tampering(Exception):
    """No honest run of the tests reports this."""


@dataclass
class _Item:
    """What was reported of one test."""

    name: str
    outcome: str = "failed"
    error: str = "it did not come to its end"
    found: list[dict[str, Any]] = field(default_factory=list)

    @property
    def function(self) -> str:
        return self.name.partition("[")[0]


def judge(exam: Exam, lines: Iterable[str]) -> Verdict:
    """The verdict.

    Args:
        exam: what was asked.
        lines: what :func:`egspo.sandbox.inside.runner.run` wrote, without ``started``; the end is
            missing where the run had no more time.

    Raises:
        SandboxError: a line is not of those.
    """
    report = _Report()
    try:
        for line in lines:
            report.add(line)
        cases, total = _Marking(exam, report).cases()
    except Tampering as found:
        names = list(exam.tests)
        why = f"tampering: {found}"
        cases = [CaseResult(name, False, why) for name in names]
        return Verdict(tuple(cases), len(cases), why, report.timed_out, tampered=True)
    error = None if report.ended else "no result for every test in time"
    if not total:
        error = report.broken or error or "there is no test"
    return Verdict(tuple(cases), total, error, report.timed_out or not report.ended)


class _Report:
    """Lines, sorted by the tests that they are about."""

    def __init__(self) -> None:
        self.items: dict[str, _Item] = {}
        self.outside: list[dict[str, Any]] = []
        self.broken: str | None = None
        self.timed_out = self.ended = False
        self._current: _Item | None = None

    def add(self, line: str) -> None:
        mark, text = line[:1], line[1:]
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            event = None
        if mark not in ("=", "-") or (mark == "=" and not isinstance(event, dict)):
            raise SandboxError(f"the sandbox reported nonsense: {line[:_MAX_TEXT]!r}")
        if not isinstance(event, dict):
            raise Tampering("a report that is none")
        if mark == "=":
            self._of_runner(event)
        else:
            self._of_program(event)

    def _of_runner(self, event: dict[str, Any]) -> None:
        if "lost" in event:
            self.timed_out |= event["lost"] == "timeout"
            late = "it took too long" if event["lost"] == "timeout" else "the process ended"
            if self._current is not None:
                self._current.error = late
            elif self.broken is None:
                self.broken = late
            self._current = None
        self.ended |= "end" in event

    def _of_program(self, event: dict[str, Any]) -> None:
        if "check" in event:
            (self.outside if self._current is None else self._current.found).append(event)
        elif "start" in event:
            name = str(event["start"]).partition("::")[2][:_MAX_NAME]
            if self._current is not None or name in self.items:
                raise Tampering("a test that begins twice, or inside of another")
            self._current = self.items[name] = _Item(name)
        elif "outcome" in event:
            item, self._current = self._current, None
            if item is None or str(event.get("end")).partition("::")[2][:_MAX_NAME] != item.name:
                raise Tampering("a test that ends before it begins")
            item.outcome = str(event["outcome"])
            item.error = str(event.get("error"))[:_MAX_TEXT]
            self.timed_out |= "took longer than" in item.error
        elif "broken" in event:
            self.broken = str(event["broken"])[:_MAX_TEXT]
            self.timed_out |= "took longer than" in self.broken


class _Marking:
    """Answers against the key."""

    def __init__(self, exam: Exam, report: _Report) -> None:
        self._exam, self._report = exam, report
        self._right: set[int] = set()
        self._decoys: set[int] = set()
        self._others = 0
        self._uses: Counter[tuple[int, int]] = Counter()

    def cases(self) -> tuple[list[CaseResult], int]:
        """Of each test that counts, and how many these are."""
        wrong_outside = [w for w in map(self._wrong, self._report.outside) if w is not None]
        by_function: dict[str, list[_Item]] = {}
        for item in self._report.items.values():
            by_function.setdefault(item.function, []).append(item)
        self._look_at_canaries(by_function)
        found: list[CaseResult] = []
        for name, written in self._exam.tests.items():
            found += self._of_function(name, written, by_function.get(name, []))
        picked = len(self._decoys | self._right)
        if picked >= _SUSPECT and not self._others and len(self._decoys) > len(self._right):
            raise Tampering("answers are picked from those that the tests offer")
        if wrong_outside:
            found = [CaseResult(case.name, False, wrong_outside[0]) for case in found]
        return found, len(found)

    def _look_at_canaries(self, by_function: dict[str, list[_Item]]) -> None:
        """They have failed, and none was left out before a test that has passed."""
        order = {name: place for place, name in enumerate(self._exam.order)}
        passed = [
            order.get(name.partition("::")[0], -1)
            for name, items in by_function.items()
            if any(item.outcome == "passed" for item in items)
        ]
        last = max(passed, default=-1)
        if passed and self._report.ended:
            last = len(order)
        for name in self._exam.canaries:
            items = by_function.get(name, [])
            if any(item.outcome != "failed" for item in items):
                raise Tampering("a test that cannot pass has passed")
            if not items and order[name] < last:
                raise Tampering("a test was left out")

    def _of_function(self, name: str, written: Written, items: list[_Item]) -> list[CaseResult]:
        if written.count is not None and len(items) > written.count:
            raise Tampering(f"{name} has more cases than are written")
        found = []
        for item in items:
            if item.outcome == "skipped" and written.may_skip:
                continue
            error = self._error(item, written, len(items))
            found.append(CaseResult(item.name, error is None, error))
        expected = max(1, len(items)) if written.count is None else written.count
        reason = self._report.broken or "it was not run"
        return found + [CaseResult(name, False, reason)] * (expected - len(items))

    def _error(self, item: _Item, written: Written, siblings: int) -> str | None:
        """Why a test has not passed."""
        wrong = [w for w in map(self._wrong, item.found) if w is not None]
        passing = ("passed", "xfailed", "xpassed") if written.may_fail else ("passed",)
        if wrong:
            return wrong[0]
        if item.outcome not in passing:
            return item.error or item.outcome
        seen: dict[int, set[int]] = {}
        for event in item.found:
            seen.setdefault(event["check"], set()).add(event.get("choice", -1))
        for number in written.required:
            check = self._exam.checks[number]
            if number not in seen or (check.every and seen[number] != check.choices):
                return f"it did not come to {check.text}"[:_MAX_TEXT]
        for number, choices in seen.items():
            offered = self._exam.checks[number].choices
            for choice in choices if not self._exam.checks[number].every else ():
                self._uses[number, choice] += 1
                if len(offered) > 1 and self._uses[number, choice] > math.ceil(
                    siblings / len(offered)
                ):
                    return "the case of another test"
        return None

    def _wrong(self, event: dict[str, Any]) -> str | None:
        """What a check found, if it is not what should be."""
        number, found = event["check"], event.get("found")
        if not isinstance(number, int) or not 0 <= number < len(self._exam.checks):
            raise Tampering("a check that there is not")
        check = self._exam.checks[number]
        if not isinstance(found, str) or not found or set(found) - {"0", "1"}:
            raise Tampering("a check with an impossible result")
        if check.choices:
            good = self._chosen(check.choices, event.get("choice"), found)
        else:
            good = found == ("1" if check.holds else "0")
        return None if good else f"AssertionError: {check.text}"[:_MAX_TEXT]

    def _chosen(self, choices: frozenset[int], choice: Any, found: str) -> bool:
        if not isinstance(choice, int) or choice not in choices:
            raise Tampering("a check of another value")
        place, count = self._exam.answers[choice]
        if len(found) != count:
            raise Tampering("a check with an impossible result")
        if found.count("1") > 1:
            raise Tampering("a value that is equal to several different ones")
        right = found[place] == "1"
        if count >= _TELLING:
            self._others += "1" not in found
            if "1" in found:
                (self._right if right else self._decoys).add(choice)
        return right
