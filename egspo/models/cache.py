"""Keys and values of a whole sequence, for passes over some of its columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class KeyValueCache:
    """Rotated keys and values of every layer, each [B, kv_heads, S, head_dim].

    A pass over a few columns attends to the cached ones and to its own fresh ones, which take the
    place of what the cache has at those columns.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add a layer."""
        self.keys.append(key)
        self.values.append(value)

    def take(self, rows: Tensor) -> KeyValueCache:
        """The sequences at int64 ``rows``, which may repeat."""
        return KeyValueCache([k[rows] for k in self.keys], [v[rows] for v in self.values])

    def clone(self) -> KeyValueCache:
        return KeyValueCache([k.clone() for k in self.keys], [v.clone() for v in self.values])

    def copy_(self, other: KeyValueCache) -> None:
        """Overwrite everything with a cache of the same shape."""
        for mine, theirs in zip(
            (*self.keys, *self.values), (*other.keys, *other.values), strict=True
        ):
            mine.copy_(theirs)

    def narrow(self, low: int, high: int) -> KeyValueCache:
        """The columns [``low``, ``high``), in the same memory."""
        return KeyValueCache(
            [k[:, :, low:high] for k in self.keys], [v[:, :, low:high] for v in self.values]
        )

    def room(self, rows: int, length: int) -> KeyValueCache:
        """Zeros for ``rows`` sequences of ``length`` columns."""

        def zeros(tensors: list[Tensor]) -> list[Tensor]:
            return [t.new_zeros(rows, t.shape[1], length, t.shape[3]) for t in tensors]

        return KeyValueCache(zeros(self.keys), zeros(self.values))

    def put(self, rows: Tensor, first: int, other: KeyValueCache, source: Tensor) -> None:
        """Write the sequences ``source`` of ``other`` to ``rows``, from column ``first`` on."""
        for mine, theirs in zip(
            (*self.keys, *self.values), (*other.keys, *other.values), strict=True
        ):
            mine[rows, :, first : first + theirs.shape[2]] = theirs[source]

    @property
    def length(self) -> int:
        """S."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def merged(
        self, layer: int, columns: Tensor, live: Tensor | None, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of ``layer`` with fresh ones at ``columns``.

        Without gradients the cache is overwritten at those columns, which every pass does anew.

        Args:
            columns: int64 [B, n].
            live: bool [B, n], False where the cache is to be kept; None for True.
            key, value: [B, kv_heads, n, head_dim].
        """
        return (
            _scatter(self.keys[layer], columns, live, key),
            _scatter(self.values[layer], columns, live, value),
        )


@dataclass
class SharedCache(KeyValueCache):
    """The first columns of D sequences, each of which some of B sequences go on from.

    They are taken for every sequence when it is a layer's turn: no copy of all layers is held.
    """

    of: Tensor = field(kw_only=True)
    """int64 [B] in [0, D)."""
    columns: int = field(kw_only=True)
    """S, of the B sequences: what is behind the first ones is fresh in every pass."""

    @property
    def length(self) -> int:
        return self.columns

    def merged(
        self, layer: int, columns: Tensor, live: Tensor | None, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        room = self.columns - self.keys[layer].shape[2]
        of_layer = KeyValueCache(
            *([F.pad(t[layer][self.of], (0, 0, 0, room))] for t in (self.keys, self.values))
        )
        return of_layer.merged(0, columns, live, key, value)


def _scatter(cached: Tensor, columns: Tensor, live: Tensor | None, fresh: Tensor) -> Tensor:
    index = columns[:, None, :, None].expand(-1, cached.shape[1], -1, cached.shape[3])
    fresh = fresh.to(cached.dtype)
    if live is not None:
        fresh = fresh.where(live[:, None, :, None], cached.gather(2, index))
    if torch.is_grad_enabled():
        return cached.scatter(2, index, fresh)
    return cached.scatter_(2, index, fresh)
