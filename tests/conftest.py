"""Settings shared by all tests."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter, decided when they are first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Examples are timed by nothing: a busy machine must not fail a test. They are the same every time;
# HYPOTHESIS_PROFILE=explore draws others.
hypothesis.settings.register_profile("egspo", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "egspo"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
