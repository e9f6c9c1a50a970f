"""The compiled CPU library: found next to this file, loaded once, called through ctypes.

It is plain C (see ``csrc/``), so one build serves every torch and every Python. An installation
without it works: the backends that need it report why they cannot run.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

from torch import Tensor

_ABI_VERSION = 1  # EGSPO_ABI_VERSION in csrc/select_steps.h
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
LIBRARY_PATH = Path(__file__).with_name(f"libegspo_cpu{_SUFFIX}")

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SIGNATURES = {
    # entropy, batch, steps, row_stride, limits, k, indices
    "egspo_select_steps": (_POINTER, _INT64, _INT64, _INT64, _POINTER, _INT64, _POINTER),
    # token_entropy, step_ids, batch, tokens, row_stride, steps, reduce, limits, k, indices
    "egspo_select_steps_segmented": (
        *(_POINTER, _POINTER, _INT64, _INT64, _INT64, _INT64, _INT32),
        *(_POINTER, _INT64, _POINTER),
    ),
}
_STATUS = {1: "invalid argument", 2: "out of memory"}


def load_library(path: Path) -> ctypes.CDLL:
    """The library at ``path``, its functions typed.

    Raises:
        OSError: it is missing, cannot be loaded, or has another ABI than this package.
    """
    if not path.exists():
        raise OSError(
            f"{path.name} was not built: no C++ compiler or ninja at installation "
            "(reinstall with EGSPO_REQUIRE_EXTENSION=1 to see the error)"
        )
    library = ctypes.CDLL(str(path))
    try:
        version = library.egspo_abi_version()
        for prefix, arguments in _SIGNATURES.items():
            for suffix in ("f32", "f64"):
                function = library[f"{prefix}_{suffix}"]
                function.argtypes = arguments
                function.restype = _INT32
                setattr(library, f"{prefix}_{suffix}", function)
    except AttributeError as error:
        raise OSError(f"{path.name} lacks a function, reinstall egspo: {error}") from error
    if version != _ABI_VERSION:
        raise OSError(
            f"{path.name} has ABI version {version}, expected {_ABI_VERSION}: reinstall egspo"
        )
    return library


@functools.cache
def cpu_library() -> ctypes.CDLL | str:
    """The CPU library of this installation, or the reason why there is none."""
    try:
        return load_library(LIBRARY_PATH)
    except OSError as error:
        return str(error)


def call(function: str, *arguments: Tensor | int | None) -> None:
    """Call a function of the CPU library; tensors pass their address, None a null pointer.

    Raises:
        RuntimeError: there is no library, or the function reports an error.
    """
    library = cpu_library()
    if isinstance(library, str):
        raise RuntimeError(library)
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    status = getattr(library, function)(*plain)
    if status != 0:
        raise RuntimeError(f"{function} failed: {_STATUS.get(status, f'status {status}')}")
