"""The tests of the Triton kernels on what the compiler makes of them, for two architectures.

The interpreter knows nothing of layouts, widths of loads, hints of alignment or the order of sums.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

GROUPS = (("stats", "sampling"), ("surrogate", "surrogate_autograd", "steps"))
"""Files that one process tests."""
LEFT_OUT = (
    "any_values",
    "interpreter",
    "frequencies",
    "real_size",
    "which_backend",
    "whole_graph",
    "opcheck",
)
"""Hypothesis compiles for every vocabulary that it tries; the rest is not about what kernels do."""


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernel_tests_pass_on_compiled_code(names: tuple[str, ...], capability: int) -> None:
    # Triton is interpreted in this process, and would be in a child that is told so.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", "-x", "-p", "tests.kernels.ptx.plugin"),
            *("-p", "no:cacheprovider"),
            *(f"tests/kernels/test_triton_{name}.py" for name in names),
            *("-k", "not (" + " or ".join(LEFT_OUT) + ")"),
            *("-m", "not slow"),
        ],
        capture_output=True,
        text=True,
        env=environment | {"EGSPO_PTX_CAPABILITY": str(capability)},
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) >= 35
