"""Texts of prompts that users give."""

from __future__ import annotations

from collections.abc import Sequence


def check_instruction(
    instruction: str | None, places: Sequence[str], prompt_style: str, *, every: bool = False
) -> None:
    """An ``instruction`` must say where the problem goes.

    Args:
        instruction: from a recipe; None for the task's own.
        places: one of these must be in it, or ``every`` one.
        prompt_style: of the task; only ``instruct`` has an instruction.

    Raises:
        ValueError: it does not, is no text, or is without effect.
    """
    if instruction is None:
        return
    if prompt_style != "instruct":
        raise ValueError(f"instruction has no effect with prompt_style: {prompt_style}")
    if not isinstance(instruction, str):
        raise ValueError(f"instruction must be a text, got {instruction!r}")
    found = [place in instruction for place in places]
    if not (all(found) if every else any(found)):
        between = " and " if every else " or "
        raise ValueError(
            f"instruction must have {between.join(places)}, where the problem goes, got "
            f"{instruction!r:.100}"
        )
