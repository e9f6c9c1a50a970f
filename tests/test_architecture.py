"""Imports run one way: down through the rooms, and never in a circle."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest

from tests import rooms


def test_imports_run_down_through_the_rooms() -> None:
    order = list(rooms.ROOMS)
    upward = [
        f"{room} imports {other}"
        for room, others in rooms.room_imports(rooms.imports()).items()
        for other in others
        if order.index(other) > order.index(room)
    ]
    assert not upward


def test_no_module_imports_in_a_circle() -> None:
    modules = rooms.imports()
    # The public names stand at the top, and what asks for the version number there is no circle.
    modules = {name: others - {"egspo"} for name, others in modules.items() if name != "egspo"}
    try:
        TopologicalSorter(modules).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_module_without_a_room_is_found() -> None:
    assert rooms.room_of("egspo.tasks.sudoku") == "tasks"
    with pytest.raises(KeyError, match="has no room"):
        rooms.room_of("egspo.attic")


def test_the_picture_is_todays() -> None:
    page = rooms.PAGE.read_text("utf-8")
    assert "```mermaid" in page
    assert rooms.drawn(page) == page, "draw it again: python -m tests.rooms"
