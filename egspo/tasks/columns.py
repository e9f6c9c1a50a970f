"""What the columns of a task are called in the files that users have."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from egspo.tasks.base import nearest


class ColumnNames:
    """The option ``columns`` of a task: what its columns are called in the files.

    A file that has the other name is read by it, one that has not by the task's own, so that
    training and test data may differ.
    """

    def __init__(self, option: object, own: Iterable[str], usual: Mapping[str, str] | None = None):
        """
        Args:
            option: from a recipe; None for no other names.
            own: the task's names.
            usual: what the columns are often called, used where ``option`` is None.

        Raises:
            ValueError: ``option`` is no mapping of some of ``own`` to names.
        """
        known = sorted(own)
        given = {} if option is None else option
        if not isinstance(given, Mapping) or not all(isinstance(v, str) for v in given.values()):
            raise ValueError(
                f"columns must map names of {known} to those of the file, got {option!r}"
            )
        for name in given:
            if name not in known:
                raise ValueError(f"columns: the task has no column {name!r}{nearest(name, known)}")
        self._names = dict(given) if option is not None else dict(usual or {})
        self._missing = set(given)

    def other(self, own: str) -> str:
        """The name that a file may have instead of the task's."""
        return self._names.get(own, own)

    def of(self, available: Collection[str]) -> dict[str, str]:
        """Names in a file that has these columns, by the task's own where it has others."""
        there = {own: other for own, other in self._names.items() if other in available}
        self._missing -= there.keys()
        return there

    def check_used(self) -> None:
        """Raises ValueError if a name of the option was in no file that was read."""
        for own in sorted(self._missing):
            raise ValueError(
                f"columns: no data has the column {self._names[own]!r}, which {own!r} stands for"
            )
