"""What arithmetic instructions compute, on numpy arrays of the bits of registers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
SMALLEST_NORMAL = np.float32(2.0**-126)


def as_type(bits: np.ndarray, kind: str) -> np.ndarray:
    """Bits of a register read as a PTX type: ``u32``, ``b64``, ``s16``, ``f32``, ``f16``, ``bf16``.

    bfloat16 comes as float32.
    """
    size = int(kind.lstrip("abcdefghijklmnopqrstuvwxyz"))
    raw = np.ascontiguousarray(bits.astype(UNSIGNED[size], copy=False))
    if kind == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind.startswith("f"):
        return raw.view({16: np.float16, 32: np.float32, 64: np.float64}[size])
    return raw.view(SIGNED[size]) if kind.startswith("s") else raw


def as_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Values of a PTX type as the bits of a register; rounds to nearest, ties to even."""
    if kind == "bf16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
    size = int(kind.lstrip("abcdefghijklmnopqrstuvwxyz"))
    if kind.startswith("f"):
        values = values.astype({16: np.float16, 32: np.float32, 64: np.float64}[size])
        return np.ascontiguousarray(values).view(UNSIGNED[size])
    return np.ascontiguousarray(values).astype(UNSIGNED[size])


def flush(values: np.ndarray) -> np.ndarray:
    """Subnormal float32 become zero of the same sign."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a b + c`` of float32: the product is exact in float64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c).astype(np.float32)


def nudge(values: np.ndarray, ulps: int) -> np.ndarray:
    """Results of an approximate unit: off by up to so many units, by a function of the value."""
    if not ulps:
        return values
    bits = np.ascontiguousarray(values).view(np.uint32)
    offset = (bits * np.uint32(2654435761) >> np.uint32(20)).astype(np.int64) % (
        2 * ulps + 1
    ) - ulps
    moved = (bits.astype(np.int64) + offset).astype(np.uint32).view(np.float32)
    # Powers of two are exact, and what is zero, infinite or NaN stays so.
    exact = (bits << np.uint32(9) == 0) | ~np.isfinite(values) | (values < SMALLEST_NORMAL)
    return np.where(exact, values, moved)


def _in_double(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def run(*arguments: np.ndarray) -> np.ndarray:
        return function(*(each.astype(np.float64) for each in arguments)).astype(np.float32)

    return run


FLOAT: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
}
APPROXIMATE: dict[str, Callable[..., np.ndarray]] = {
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "rcp": _in_double(lambda x: 1 / x),
    "div": _in_double(np.divide),
}


def extreme(name: str, propagates_nan: bool, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``min`` or ``max``: the number wins over a NaN, or the NaN if it propagates."""
    if name == "max":
        return np.maximum(a, b) if propagates_nan else np.fmax(a, b)
    return np.minimum(a, b) if propagates_nan else np.fmin(a, b)


def compare(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``setp``: with a NaN ordered comparisons are false, unordered ones true."""
    if name in ("num", "nan"):
        unordered = np.isnan(a) | np.isnan(b)
        return ~unordered if name == "num" else unordered
    functions = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    names = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    unordered_too = name.endswith("u") and name not in functions
    name = names.get(name, name[:-1] if unordered_too else name)
    result = functions[name](a, b)
    if a.dtype.kind != "f":
        return result
    unordered = np.isnan(a) | np.isnan(b)
    return result | unordered if unordered_too else result & ~unordered


def shifted(name: str, values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """``shl`` or ``shr``; by the width or more gives 0, or the sign."""
    size = 8 * values.dtype.itemsize
    inside = np.minimum(by, size - 1).astype(values.dtype)
    result = values << inside if name == "shl" else values >> inside
    filled = (
        values >> inside if name == "shr" and values.dtype.kind == "i" else np.zeros_like(values)
    )
    return np.where(by >= size, filled, result)


def multiplied(form: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``mul.lo``, ``mul.hi`` (32 bits) or ``mul.wide``."""
    if form == "lo":
        return a * b
    size = 8 * a.dtype.itemsize
    wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * size]
    product = a.astype(wide) * b.astype(wide)
    return product if form == "wide" else (product >> wide(size)).astype(a.dtype)
