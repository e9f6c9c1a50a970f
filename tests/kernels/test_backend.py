from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from egspo_kernels import UnavailableBackendError, available_backends, last_backend
from egspo_kernels.dispatch import backend as dispatch
from egspo_kernels.dispatch.backend import ENVIRONMENT_VARIABLE, Dispatcher, always_available

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)  # only named: no tensor is made on it


def gpu_only(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a GPU"


@pytest.fixture(autouse=True)
def separate_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_DISPATCHERS", dict(dispatch._DISPATCHERS))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher(
        "twice", {"cuda": gpu_only, "cpp": always_available, "reference": lambda _: None}
    )


def test_automatic_choice_is_the_first_that_can_run(dispatcher: Dispatcher) -> None:
    assert last_backend("twice") is None
    assert dispatcher.choose("auto", GPU) == "cuda"
    assert last_backend("twice") == "cuda"
    assert dispatcher.choose("auto", CPU) == "cpp"
    assert last_backend("twice") == "cpp"


def test_automatic_choice_is_logged_once_with_what_was_passed_over(
    dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "egspo_kernels")
    for _ in range(3):
        dispatcher.choose("auto", CPU)
    assert [record.getMessage() for record in caplog.records] == [
        "twice: backend cpp (passed over: cuda: needs a GPU)"
    ]
    dispatcher.choose("auto", GPU)
    assert caplog.records[-1].getMessage() == "twice: backend cuda"


def test_a_probe_is_asked_once_unless_backends_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def probe(device: torch.device) -> None:
        asked.append(device.type)

    dispatcher = Dispatcher("twice", {"cpp": probe, "reference": always_available})
    for _ in range(2):
        assert dispatcher.choose("auto", CPU) == dispatcher.choose("cpp", CPU) == "cpp"
        assert dispatcher.choose("auto", GPU) == "cpp"
        assert dispatcher.choose("auto", CPU, {"cpp": "not now"}) == "reference"
    assert asked == ["cpu", "cpu", "cuda"]
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert dispatcher.choose("auto", CPU) == "reference", "the environment is read at every call"
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert dispatcher.choose("auto", CPU) == "cpp"


def test_explicit_choice_runs_or_raises(dispatcher: Dispatcher) -> None:
    assert dispatcher.choose("reference", GPU) == "reference"
    with pytest.raises(UnavailableBackendError) as caught:
        dispatcher.choose("cuda", CPU)
    for part in ("twice", "'cuda'", "cpu", "needs a GPU", "cpp, reference"):
        assert part in str(caught.value)
    with pytest.raises(UnavailableBackendError, match=r"'triton' .* not implemented"):
        dispatcher.choose("triton", CPU)
    with pytest.raises(ValueError, match=r"backend must be .* got 'fastest'"):
        dispatcher.choose("fastest", CPU)
    with pytest.raises(ValueError, match=r"backend must be .* got \['cpp'\]"):
        dispatcher.choose(["cpp"], CPU)  # type: ignore[arg-type]
    assert last_backend("twice") == "reference"


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [
        ("reference", CPU, "reference"),
        ("auto", CPU, "cpp"),
        ("", CPU, "cpp"),
        ("triton", CPU, "cpp"),  # the function has no such backend
        ("cuda", GPU, "cuda"),
        ("twice=reference", CPU, "reference"),
        ("twice=auto", CPU, "cpp"),
        (" select_steps = cpp , twice = reference ", CPU, "reference"),
        ("select_steps=reference", CPU, "cpp"),
    ],
)
def test_environment_changes_the_automatic_choice(
    dispatcher: Dispatcher,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    device: torch.device,
    expected: str,
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, setting)
    assert dispatcher.choose("auto", device) == expected
    assert dispatcher.choose("cpp", CPU) == "cpp", "an explicit choice is not overridden"


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("cuda", UnavailableBackendError, "needs a GPU; available: cpp, reference"),
        ("twice=triton", UnavailableBackendError, "not implemented for this function"),
        ("fastest", ValueError, "unknown backend 'fastest'"),
        ("twice=fastest", ValueError, "unknown backend 'fastest'"),
        ("thrice=cpp", ValueError, r"unknown functions \['thrice'\]"),
        ("cpp,reference", ValueError, "function=backend"),
        ("twice=cpp,reference", ValueError, "function=backend"),
        ("twice=cpp,", ValueError, "unknown backend ''"),
        ("twice=cpp,twice=reference", ValueError, "twice is named twice"),
    ],
)
def test_environment_mistakes_are_errors(
    dispatcher: Dispatcher,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, setting)
    with pytest.raises(error, match=message) as caught:
        dispatcher.choose("auto", CPU)
    assert ENVIRONMENT_VARIABLE in str(caught.value)


def test_no_backend_can_run() -> None:
    dispatcher = Dispatcher("twice", {"cuda": gpu_only})
    with pytest.raises(UnavailableBackendError, match=r"twice: no backend .* cuda: needs a GPU"):
        dispatcher.choose("auto", CPU)


def test_available_backends_lists_every_function_fastest_first(dispatcher: Dispatcher) -> None:
    listing = available_backends()
    assert list(listing["twice"].items()) == [
        ("cuda", "needs a GPU"),
        ("cpp", None),
        ("reference", None),
    ]
    assert available_backends("cuda")["twice"]["cuda"] is None
    assert listing.keys() >= {"select_steps", "select_steps_segmented", "token_stats"}
    assert all(backends["reference"] is None for backends in available_backends("cuda").values())


@pytest.mark.parametrize("candidates", [{}, {"fastest": always_available}])
def test_candidates_are_known_backends(candidates: dict[str, Callable[..., None]]) -> None:
    with pytest.raises(ValueError, match="candidates"):
        Dispatcher("twice", candidates)


def test_a_function_is_registered_once(dispatcher: Dispatcher) -> None:
    with pytest.raises(ValueError, match="'twice' already has"):
        Dispatcher("twice", {"reference": always_available})


def test_last_backend_of_an_unknown_function() -> None:
    with pytest.raises(ValueError, match=r"function must be one of .* got 'twice'"):
        last_backend("twice")
