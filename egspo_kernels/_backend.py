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

    def choose(self, requested: str, device: torch.device) -> str:
        """The backend to run for tensors on ``device``.

        Args:
            requested: ``"auto"`` or a backend name.
            device: device of the tensors of this call.

        Raises:
            ValueError: ``requested``, or the environment variable, is not understood.
            UnavailableBackendError: the backend asked for is missing or cannot run.
        """
        if requested != "auto":
            chosen = self._require(requested, device, "")
        elif (forced := self._override()) is not None:
            chosen = self._require(forced, device, f" (from {ENVIRONMENT_VARIABLE})")
        else:
            chosen = self._fastest(device)
        self.last = chosen
        return chosen

    def availability(self, device: torch.device) -> dict[str, str | None]:
        """Each backend, fastest first, with None if it can run or the reason why not."""
        return {name: probe(device) for name, probe in self._candidates.items()}

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

    def _require(self, name: str, device: torch.device, origin: str) -> str:
        if name not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {name!r}{origin}")
        probe = self._candidates.get(name)
        reason = "not implemented for this function" if probe is None else probe(device)
        if reason is not None:
            usable = [other for other, why in self.availability(device).items() if why is None]
            raise UnavailableBackendError(
                f"{self.function}: backend {name!r}{origin} cannot run on {device}: {reason}; "
                f"available: {', '.join(usable) or 'none'}"
            )
        return name

    def _fastest(self, device: torch.device) -> str:
        skipped: list[str] = []
        for name, probe in self._candidates.items():
            reason = probe(device)
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
