"""Which implementation of a function runs: explicit, forced by the environment, or the fastest.

A module that implements a function creates one :class:`Dispatcher` for it at import, with its
backends and, for each, a probe that says why it cannot run. An explicit choice that cannot run
raises; the automatic choice falls back and says so once in the log.

The environment variable ``EGSPO_KERNELS_BACKEND`` changes what ``backend="auto"`` means. It holds
either one backend for every function (``reference``; functions without it stay automatic) or a
list for single functions (``select_steps=cpp,token_stats=reference``).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping

import torch

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


class Dispatcher:
    """The backends of one function.

    Args:
        function: name of the public function.
        candidates: backend name to probe, fastest backend first. A probe is called at every call
            of the function and must be cheap.
    """

    def __init__(self, function: str, candidates: Mapping[str, Probe]) -> None:
        unknown = [name for name in candidates if name not in BACKENDS]
        if unknown or not candidates:
            raise ValueError(f"candidates must be among {BACKENDS}, got {tuple(candidates)}")
        if function in _DISPATCHERS:
            raise ValueError(f"function {function!r} already has a dispatcher")
        self.function = function
        self.last: str | None = None
        self._candidates = dict(candidates)
        self._announced: set[str] = set()
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
        listing = self.availability(device)
        listing.update({name: why for name, why in (refused or {}).items() if name in listing})
        if requested != "auto":
            chosen = self._require(requested, device, listing, "")
        elif (forced := self._override()) is not None:
            chosen = self._require(forced, device, listing, f" (from {ENVIRONMENT_VARIABLE})")
        else:
            chosen = self._fastest(device, listing)
        self.last = chosen
        return chosen

    def availability(self, device: torch.device) -> dict[str, str | None]:
        """Each backend, fastest first, with None if it can run or the reason why not."""
        names = list(self._candidates)
        if device.type == "cpu" and "triton" in names:
            # There Triton is its interpreter: for tests, on explicit request.
            names.append(names.pop(names.index("triton")))
        return {name: self._candidates[name](device) for name in names}

    def _override(self) -> str | None:
        setting = os.environ.get(ENVIRONMENT_VARIABLE)
        if not setting:
            return None
        forced = _parse_override(setting)
        if isinstance(forced, str):
            return forced if forced in self._candidates else None
        unknown = forced.keys() - _DISPATCHERS.keys()
        if unknown:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}={setting!r} names unknown functions {sorted(unknown)}; "
                f"known: {sorted(_DISPATCHERS)}"
            )
        chosen = forced.get(self.function)
        return None if chosen == "auto" else chosen

    def _require(
        self, name: str, device: torch.device, listing: dict[str, str | None], origin: str
    ) -> str:
        if name not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {name!r}{origin}")
        reason = listing.get(name, "not implemented for this function")
        if reason is not None:
            usable = [other for other, why in listing.items() if why is None]
            raise UnavailableBackendError(
                f"{self.function}: backend {name!r}{origin} cannot run on {device}: {reason}; "
                f"available: {', '.join(usable) or 'none'}"
            )
        return name

    def _fastest(self, device: torch.device, listing: dict[str, str | None]) -> str:
        skipped: list[str] = []
        for name, reason in listing.items():
            if reason is None:
                if name not in self._announced:
                    self._announced.add(name)
                    passed_over = f" (passed over: {'; '.join(skipped)})" if skipped else ""
                    _LOGGER.info("%s: backend %s%s", self.function, name, passed_over)
                return name
            skipped.append(f"{name}: {reason}")
        raise UnavailableBackendError(
            f"{self.function}: no backend can run on {device}: {'; '.join(skipped)}"
        )


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
