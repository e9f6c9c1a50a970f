from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def interpreter_without_waste() -> Iterator[None]:
    """Triton's interpreter prepares its language again, 5 ms, for each call of a device function.

    Here it does so once in a launch for each module with such functions. Nor does it compute
    whether integers overflow, which it would tell nobody.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    prepare, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[int] = set()

    def prepare_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in prepared:
            return None
        prepared.add(module)
        return prepare(function)

    def execute_afresh(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        execute(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(interpreter.GridExecutor, "__call__", execute_afresh)
        options = dataclasses.replace(
            interpreter.interpreter_builder.options, sanitize_overflow=False
        )
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield


@pytest.fixture
def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 down to bfloat16 where a GPU rounds to nearest."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16  # ties to even
        rounded = np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded, target.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)
