"""Which implementation of a function runs: explicit, forced by the environment, or the fastest.

A module that implements a function creates one :class:`Dispatcher` for it at import, with its
backends and, for each, a probe that says why it cannot run. An explicit choice that cannot run
raises; the automatic choice falls back and says so once in the log.

The environment variable ``EGSPO_KERNELS_BACKEND`` changes what ``backend="auto"`` means. It holds
either one backend for every function (``reference``; functions without it stay automatic) or a
list for single functions (``select_steps=cpp,token_stats=reference``).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping

import torch

from egspo_kernels.dispatch import extension

BACKENDS = ("cuda", "triton", "cpp", "reference")
ENVIRONMENT_VARIABLE = "EGSPO_KERNELS_BACKEND"

Probe = Callable[[torch.device], str | None]
"""Returns None if the backend can run on tensors of this device, otherwise the reason why not."""

_LOGGER = logging.getLogger("egspo_kernels")
_DISPATCHERS: dict[str, Dispatcher] = {}


class UnavailableBackendError(RuntimeError):
    """The requested backend cannot run; the message says why, and what can."""


def always_available(device: torch.device) -> None:
    """The probe of a backend that runs everywhere."""
    del device


def cpp_probe(device: torch.device) -> str | None:
    """The probe of every function of the compiled CPU library."""
    if device.type != "cpu":
        return "runs on CPU tensors only"
    library = extension.cpu_library()
    return library if isinstance(library, str) else None


def triton_probe(device: torch.device) -> str | None:
    """The probe of every Triton backend."""
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
        return None if interpreted else "needs a GPU, or TRITON_INTERPRET=1 before the first call"
    if device.type == "cuda":
        return _cuda_lacks(device.index)
    return None if device.type == "xpu" else f"no support for {device.type} devices"


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache(maxsize=64)
def _cuda_lacks(index: int | None) -> str | None:
    """What the GPU lacks to run Triton kernels; torch calls AMD GPUs ``cuda`` too."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return None


def _environment_reader() -> Callable[[], str | None]:
    """Reads :data:`ENVIRONMENT_VARIABLE`.

    ``os.environ`` takes 0.6 us to find that a variable is not set, a fifth of a whole call of
    ``select_steps``; what it changes is changed for C too.
    """
    try:
        getenv = ctypes.PyDLL(None).getenv
    except (AttributeError, OSError, TypeError):  # not POSIX
        return lambda: os.environ.get(ENVIRONMENT_VARIABLE)
    getenv.argtypes, getenv.restype = (ctypes.c_char_p,), ctypes.c_char_p
    name = ENVIRONMENT_VARIABLE.encode()

    def read() -> str | None:
        value: bytes | None = getenv(name)
        return None if value is None else os.fsdecode(value)

    return read


_read_environment = _environment_reader()


class Dispatcher:
    """The backends of one function.

    Args:
        function: name of the public function.
        candidates: backend name to probe, fastest backend first. What a probe says of a device is
            kept where a choice followed from it.
    """

    def __init__(self, function: str, candidates: Mapping[str, Probe]) -> None:
        unknown = [name for name in candidates if name not in BACKENDS]
        if unknown or not candidates:
            raise ValueError(f"candidates must be among {BACKENDS}, got {tuple(candidates)}")
        if function in _DISPATCHERS:
            raise ValueError(f"function {function!r} already has a dispatcher")
        self.function = function
        self.last: str | None = None
        self._probes = dict(candidates)
        self._elsewhere = tuple(candidates.items())
        # On a CPU Triton is its interpreter: for tests, on explicit request.
        self._on_cpu = tuple(sorted(self._elsewhere, key=lambda item: item[0] == "triton"))
        self._announced: set[str] = set()
        self._chosen: dict[tuple[str, str | None, torch.device], str] = {}
        _DISPATCHERS[function] = self

    def choose(
        self, requested: str, device: torch.device, refused: Mapping[str, str] | None = None
    ) -> str:
        """The backend to run for tensors on ``device``.

        Args:
            requested: ``"auto"`` or a backend name.
            device: device of the tensors of this call.
            refused: backends that cannot take the arguments of this call, and why.

        Raises:
            ValueError: ``requested``, or the environment variable, is not understood.
            UnavailableBackendError: the backend asked for is missing or cannot run.
        """
        setting = _read_environment() if requested == "auto" else None
        call = (requested, setting, device)
        if refused or not isinstance(requested, str):  # which may not be a key, and is refused
            chosen = self._decide(*call, refused or {})
        elif (known := self._chosen.get(call)) is not None:
            chosen = known
        else:
            chosen = self._chosen[call] = self._decide(*call, {})
        self.last = chosen
        return chosen

    def availability(self, device: torch.device) -> dict[str, str | None]:
        """Each backend, fastest first, with None if it can run or the reason why not."""
        return {name: probe(device) for name, probe in self._order(device)}

    def _order(self, device: torch.device) -> tuple[tuple[str, Probe], ...]:
        return self._on_cpu if device.type == "cpu" else self._elsewhere

    def _decide(
        self,
        requested: str,
        setting: str | None,
        device: torch.device,
        refused: Mapping[str, str],
    ) -> str:
        if requested != "auto":
            return self._require(requested, device, refused, "")
        forced = self._override(setting) if setting else None
        if forced is not None:
            return self._require(forced, device, refused, f" (from {ENVIRONMENT_VARIABLE})")
        return self._fastest(device, refused)

    def _override(self, setting: str) -> str | None:
        """The backend that the environment variable names for this function, if any."""
        forced = _parse_override(setting)
        if isinstance(forced, str):
            return forced if forced in self._probes else None
        unknown = forced.keys() - _DISPATCHERS.keys()
        if unknown:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}={setting!r} names unknown functions {sorted(unknown)}; "
                f"known: {sorted(_DISPATCHERS)}"
            )
        chosen = forced.get(self.function)
        return None if chosen == "auto" else chosen

    def _require(
        self, name: str, device: torch.device, refused: Mapping[str, str], origin: str
    ) -> str:
        if name not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {name!r}{origin}")
        probe = self._probes.get(name)
        if probe is None:
            reason: str | None = "not implemented for this function"
        else:
            reason = refused.get(name) or probe(device)
        if reason is None:
            return name
        usable = [
            other
            for other, why in self.availability(device).items()
            if why is None and other not in refused
        ]
        raise UnavailableBackendError(
            f"{self.function}: backend {name!r}{origin} cannot run on {device}: {reason}; "
            f"available: {', '.join(usable) or 'none'}"
        )

    def _fastest(self, device: torch.device, refused: Mapping[str, str]) -> str:
        skipped: list[tuple[str, str]] = []
        for name, probe in self._order(device):
            reason = refused.get(name) or probe(device)
            if reason is None:
                if name not in self._announced:
                    self._announce(name, skipped)
                return name
            skipped.append((name, reason))
        listing = _listing(skipped)
        raise UnavailableBackendError(f"{self.function}: no backend can run on {device}: {listing}")

    def _announce(self, name: str, skipped: list[tuple[str, str]]) -> None:
        self._announced.add(name)
        passed_over = f" (passed over: {_listing(skipped)})" if skipped else ""
        _LOGGER.info("%s: backend %s%s", self.function, name, passed_over)


def _listing(skipped: list[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in skipped)


@functools.lru_cache(maxsize=16)
def _parse_override(setting: str) -> str | dict[str, str]:
    """One backend for all functions, or a backend per function."""
    per_function: dict[str, str] = {}
    for item in setting.split(","):
        function, separator, name = (part.strip() for part in item.rpartition("="))
        if name != "auto" and name not in BACKENDS:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}={setting!r}: unknown backend {name!r}; "
                f"expected one of {BACKENDS}"
            )
        if not separator:
            if "," in setting:
                raise ValueError(
                    f"{ENVIRONMENT_VARIABLE}={setting!r}: a list must be of function=backend items"
                )
            return name
        if function in per_function:
            raise ValueError(f"{ENVIRONMENT_VARIABLE}={setting!r}: {function} is named twice")
        per_function[function] = name
    return per_function


def last_backend(function: str) -> str | None:
    """The backend the last call of ``function`` ran, in any thread; None before the first call.

    Raises:
        ValueError: no such function.
    """
    if function not in _DISPATCHERS:
        raise ValueError(f"function must be one of {sorted(_DISPATCHERS)}, got {function!r}")
    return _DISPATCHERS[function].last


def available_backends(
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, str | None]]:
    """The backends of every function, fastest first, for tensors on ``device``.

    Returns:
        function to backend to None (it can run) or the reason why it cannot.
    """
    resolved = torch.device(device)
    return {
        function: dispatcher.availability(resolved)
        for function, dispatcher in sorted(_DISPATCHERS.items())
    }
