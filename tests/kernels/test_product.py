"""How rows are cut into chunks."""

from __future__ import annotations

import pytest

from egspo_kernels.shared.product import TILE_ROWS, chunks


@pytest.mark.parametrize(
    ("rows", "most", "sizes"),
    [
        (0, 5, [0]),
        (5, 5, [5]),
        (530, 530, [530]),  # one chunk, whatever its size
        (2048, 530, [512] * 4),
        (600, 530, [384, 216]),
        (1025, 1024, [640, 385]),
        (129, 128, [128, 1]),
        (100, 60, [50, 50]),
        (7, 3, [3, 3, 1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_chunks_are_whole_tiles_of_about_one_size(rows: int, most: int, sizes: list[int]) -> None:
    assert [part.stop - part.start for part in chunks(rows, most)] == sizes


def test_chunks_cover_the_rows_in_order() -> None:
    for rows in range(1, 700, 13):
        for most in (1, 2, 127, 128, 129, 300, 512):
            parts = list(chunks(rows, most))
            assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
            assert (parts[0].start, parts[-1].stop) == (0, rows)
            assert all(0 < part.stop - part.start <= most for part in parts)
            tiled = len(parts) > 1 and most >= TILE_ROWS
            assert not tiled or all(part.start % TILE_ROWS == 0 for part in parts)
