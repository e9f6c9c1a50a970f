"""A plugin of pytest: Triton kernels run compiled, simulated on CPU tensors.

    python -m pytest -p tests.kernels.ptx.plugin tests/kernels/test_triton_stats.py

``EGSPO_PTX_CAPABILITY`` is the architecture (90), ``EGSPO_PTX_ULPS`` how far approximate functions
are off (2, as the hardware's may be).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil

import pytest
import triton

_STACK = contextlib.ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    del config
    # Kernels are made for the interpreter or for a compiler when they are imported.
    triton.knobs.runtime.interpret = False
    from egspo_kernels import triton_kernels

    for module in pkgutil.iter_modules(triton_kernels.__path__):
        importlib.import_module(f"{triton_kernels.__name__}.{module.name}")
    from tests.kernels.ptx.simulate import simulated

    capability = int(os.environ.get("EGSPO_PTX_CAPABILITY", "90"))
    ulps = int(os.environ.get("EGSPO_PTX_ULPS", "2"))
    _STACK.enter_context(simulated(capability, ulps))
    # Read when a backend is chosen: it allows CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    del config
    _STACK.close()
