"""Global memory made of CPU tensors: every access must lie inside one of them, and be aligned."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class AccessProblem(RuntimeError):
    """An access out of bounds or not aligned, with its address."""


class Memory:
    """The storages of some tensors, at their real addresses."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                spans[storage.data_ptr()] = storage.nbytes()
        self._starts = np.array(sorted(spans), dtype=np.int64)
        self._sizes = np.array([spans[start] for start in sorted(spans)], dtype=np.int64)
        self._bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * spans[start]).from_address(start))
            for start in sorted(spans)
        ]

    def load(self, addresses: np.ndarray, bits: int, count: int) -> np.ndarray:
        """``count`` numbers of so many bits from each address, [count, addresses]."""
        width = bits // 8 * count
        found = np.empty((len(addresses), width), np.uint8)
        for which, lanes, offsets in self._places(addresses, width, "load"):
            found[lanes] = self._bytes[which][offsets[:, None] + np.arange(width)]
        return found.view(UNSIGNED[bits]).T

    def store(self, addresses: np.ndarray, bits: int, values: list[np.ndarray]) -> None:
        """Numbers of so many bits, one after the other, to each address; the last lane wins."""
        width = bits // 8 * len(values)
        columns = np.stack([value.astype(UNSIGNED[bits]) for value in values], axis=1)
        data = np.ascontiguousarray(columns).view(np.uint8).reshape(len(addresses), width)
        for which, lanes, offsets in self._places(addresses, width, "store"):
            self._bytes[which][offsets[:, None] + np.arange(width)] = data[lanes]

    def _places(
        self, addresses: np.ndarray, width: int, what: str
    ) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """For each storage touched: its number, the lanes, and their offsets into it."""
        addresses = addresses.astype(np.int64)
        if (addresses % width).any():
            bad = addresses[addresses % width != 0][0]
            raise AccessProblem(f"{what} of {width} bytes at {hex(bad)} is not aligned")
        which = np.searchsorted(self._starts, addresses, side="right") - 1
        offsets = addresses - self._starts[np.maximum(which, 0)]
        outside = (which < 0) | (offsets + width > self._sizes[np.maximum(which, 0)])
        if outside.any():
            raise AccessProblem(
                f"{what} of {width} bytes out of bounds, {int(outside.sum())} lanes"
            )
        return [
            (int(number), lanes, offsets[lanes])
            for number in np.unique(which)
            for lanes in [np.nonzero(which == number)[0]]
        ]
