"""Settings shared by all tests."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# Examples are timed by nothing: a busy machine must not fail a test.
hypothesis.settings.register_profile("egspo", deadline=None)
hypothesis.settings.load_profile("egspo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
