"""A sandbox that runs here, or the reason why the tests that need one are skipped."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest

from egspo.sandbox import Bubblewrap, Limits, SandboxUnavailable


@functools.cache
def unavailable() -> str | None:
    backend = Bubblewrap()
    try:
        backend.check()
    except SandboxUnavailable as error:
        return str(error)
    finally:
        backend.close()
    return None


def require_bubblewrap() -> None:
    reason = unavailable()
    if reason is not None and os.environ.get("EGSPO_REQUIRE_SANDBOX") == "1":
        pytest.fail(f"EGSPO_REQUIRE_SANDBOX is set, and {reason}")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def sandbox() -> Iterator[Bubblewrap]:
    require_bubblewrap()
    backend = Bubblewrap(LIMITS)
    yield backend
    backend.close()


# A hanging test ends after `test_seconds`: small ones keep the suite fast.
LIMITS = Limits(test_seconds=1.0, wall_seconds=15.0, cpu_seconds=3, memory_mb=256, tmp_mb=4)
