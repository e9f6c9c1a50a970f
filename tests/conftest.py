"""Settings shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from egspo.tasks import Reward

# Without a GPU, Triton kernels run in Triton's interpreter, decided when they are first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Examples are timed by nothing: a busy machine must not fail a test. They are the same every time;
# HYPOTHESIS_PROFILE=explore draws others.
hypothesis.settings.register_profile("egspo", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "egspo"))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the tiny runs of the tests do."""
    monkeypatch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)


@pytest.fixture
def letters() -> Iterator[list[Reward]]:
    """The rewards of the task ``letters``, to be filled."""
    from tests.helpers import runs

    assert not runs.rewards, "an earlier test left its rewards"
    yield runs.rewards
    runs.rewards.clear()


@pytest.fixture
def varied(letters: list[Reward]) -> None:
    """Every group of the task ``letters`` has something to teach."""
    from egspo.tasks import Reward
    from tests.helpers import runs

    letters.append(Reward("varied", runs.varied))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
