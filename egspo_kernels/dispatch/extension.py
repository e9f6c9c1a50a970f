"""The compiled libraries: found in the package, loaded once, called through ctypes.

They are plain C (see ``csrc/``), so one build serves every torch and every Python. An installation
without them works: the backends that need one report why they cannot run.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_ABI_VERSION = 1  # EGSPO_ABI_VERSION in csrc/select_steps.h
_CUDA_ERROR = 1000  # EGSPO_CUDA_ERROR in csrc/select_steps_cuda.h
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
LIBRARY_PATH = Path(__file__).parents[1] / f"libegspo_cpu{_SUFFIX}"
CUDA_LIBRARY_PATH = LIBRARY_PATH.with_name(f"libegspo_cuda{_SUFFIX}")

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
# entropy, batch, steps, row_stride, limits, k, indices
_STEPS = (_POINTER, _INT64, _INT64, _INT64, _POINTER, _INT64, _POINTER)
# token_entropy, step_ids, batch, tokens, row_stride, steps, reduce, limits, k, indices
_TOKENS = (_POINTER, _POINTER, _INT64, _INT64, _INT64, _INT64, _INT32, _POINTER, _INT64, _POINTER)
# rows, row_index, count, targets, logsumexp, entropy, log_prob, argmax, confidence, maximum, total
_STATS = (_POINTER, _POINTER, _INT64, *(_POINTER,) * 8)
# rows, row_ids, seed, step, entropy_temperature, token, log_prob, confidence, entropy
_SAMPLE = (_POINTER, _POINTER, _INT64, _INT64, ctypes.c_double, *(_POINTER,) * 4)
_CPU_FUNCTIONS = {
    "egspo_token_stats": _STATS,
    "egspo_sample_tokens": _SAMPLE,
    # rows, reference, targets, log_prob, kl, maximum, total, reference_maximum, mean_difference
    "egspo_row_divergence": (_POINTER,) * 9,
    # rows, of, gradient, gradient_stride
    "egspo_row_gradient": (_POINTER, _POINTER, _POINTER, _INT64),
    "egspo_select_steps_f32": _STEPS,
    "egspo_select_steps_f64": _STEPS,
    "egspo_select_steps_segmented_f32": _TOKENS,
    "egspo_select_steps_segmented_f64": _TOKENS,
}
_CUDA_FUNCTIONS = {
    "egspo_cuda_check": (),
    # ..., stream
    "egspo_cuda_select_steps_f32": (*_STEPS, _POINTER),
    "egspo_cuda_select_steps_f64": (*_STEPS, _POINTER),
    # ..., workspace, stream
    "egspo_cuda_select_steps_segmented_f32": (*_TOKENS, _POINTER, _POINTER),
    "egspo_cuda_select_steps_segmented_f64": (*_TOKENS, _POINTER, _POINTER),
}
_STATUS = {1: "invalid argument", 2: "out of memory"}


def load_library(path: Path, *, cuda: bool = False) -> ctypes.CDLL:
    """The CPU or the CUDA library at ``path``, its functions typed.

    Raises:
        OSError: it is missing, cannot be loaded, or has another ABI than this package.
    """
    if not path.exists():
        lacking = "nvcc" if cuda else "C++ compiler or ninja"
        variable = "EGSPO_REQUIRE_CUDA" if cuda else "EGSPO_REQUIRE_EXTENSION"
        raise OSError(
            f"{path.name} was not built: no {lacking} at installation "
            f"(reinstall with {variable}=1 to see the error)"
        )
    library = ctypes.CDLL(str(path))
    try:
        version = library.egspo_abi_version()
        for name, arguments in (_CUDA_FUNCTIONS if cuda else _CPU_FUNCTIONS).items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = _INT32
        texts = ("egspo_cuda_error_name", "egspo_cuda_error_string")
        for name in texts if cuda else ("egspo_vector_instructions",):
            getattr(library, name).restype = ctypes.c_char_p
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


@functools.cache
def cuda_library() -> ctypes.CDLL | str:
    """The CUDA library of this installation, or the reason why it is not loaded."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        return load_library(CUDA_LIBRARY_PATH, cuda=True)
    except OSError as error:
        return str(error)


@functools.cache
def cuda_device_lacks(index: int | None) -> str | None:
    """Why the kernels of the CUDA library cannot run on a device; None if they can.

    Args:
        index: of the device; None for the current one when this is first asked.
    """
    library = cuda_library()
    if isinstance(library, str):
        return library
    with torch.cuda.device(index):
        status = library.egspo_cuda_check()
    return None if status == 0 else describe(library, status)


def call(function: str, *arguments: object) -> None:
    """Call a function of the CPU library; tensors pass their address, None a null pointer.

    Others are passed as they are.

    Raises:
        RuntimeError: there is no library, or the function reports an error.
    """
    call_plain(cpu_library(), function, _addresses(arguments))


def call_plain(library: ctypes.CDLL | str, function: str, arguments: Sequence[object]) -> None:
    """:func:`call` of a library, of arguments as they are: addresses are numbers, for speed."""
    if isinstance(library, str):
        raise RuntimeError(library)
    status = getattr(library, function)(*arguments)
    if status != 0:
        raise RuntimeError(f"{function} failed: {describe(library, status)}")


def call_cuda(function: str, device: torch.device, *arguments: object) -> None:
    """Call a function of the CUDA library on the current stream of ``device``, as :func:`call`."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        call_plain(cuda_library(), function, [*_addresses(arguments), stream])


def describe(library: ctypes.CDLL, status: int) -> str:
    """What a status other than 0 means."""
    if status < _CUDA_ERROR:
        return _STATUS.get(status, f"status {status}")
    name = library.egspo_cuda_error_name(status).decode()
    return f"{name}: {library.egspo_cuda_error_string(status).decode()}"


def _addresses(arguments: Sequence[object]) -> list[object]:
    return [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
