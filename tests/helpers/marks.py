"""Which cases of a parametrised test are fast ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(cases: Iterable[Any]) -> list[Any]:
    """The same cases, left to ``make test-slow``; several values of one case are a tuple."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def first_fast(cases: Iterable[Any], fast: int = 1) -> list[Any]:
    """The first ``fast`` cases, and the others as slow ones."""
    listed = list(cases)
    return [*listed[:fast], *slow(listed[fast:])]


def slow_but(kept: set[str], names: Iterable[str]) -> list[Any]:
    """``names``, of which the fast tests take those ``kept``."""
    listed = list(names)
    assert kept <= set(listed)
    return [pytest.param(n, marks=() if n in kept else pytest.mark.slow) for n in listed]
