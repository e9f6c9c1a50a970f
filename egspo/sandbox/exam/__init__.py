"""Test files as exams: multiple choice, with a key that stays outside of the program's reach.

Tests in pytest's form run in the program's process, where nothing can be hidden from it and no
report can be trusted. So the tests that go there do not say what is right. ``assert f(3) == 5``
becomes a check of which of sixteen values ``f(3)`` is equal to, five being one of them; ``assert
not f(3)`` a check of what ``f(3)`` is. A program that reads its tests, replaces parts of pytest or
writes reports of its own can claim any answer, but not know which one is right, unless it computes
it.

Two tests more stand among the others, named as they are. They call what does not exist, so must
fail.
"""

from __future__ import annotations

from egspo.sandbox.exam.judge import judge
from egspo.sandbox.exam.setting import Exam, set_exam

__all__ = ["Exam", "judge", "set_exam"]
