"""What commands share: how one is added, and what training commands show."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Protocol

Command = Callable[[argparse.Namespace], int | None]
"""Runs a command and returns its exit code, None for 0."""


class AddCommand(Protocol):
    """Adds a command to the parser of ``egspo`` and returns its own."""

    def __call__(
        self,
        name: str,
        help_text: str,
        run: Command,
        epilog: str = "",
    ) -> argparse.ArgumentParser: ...


def configure_output() -> None:
    """One progress bar, and the messages of egspo above it, from the main process only."""
    from rich.logging import RichHandler

    from egspo.training.progress import stderr_console

    for name in ("egspo", "egspo_kernels"):  # the kernels say which backend runs
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)
        if not logger.handlers:
            handler = RichHandler(
                console=stderr_console(), show_time=False, show_level=False, show_path=False
            )
            logger.addHandler(handler)
    hide_loading_bars()


def hide_loading_bars() -> None:
    """Loading and saving weights need no bars; downloads take long and keep theirs."""
    import huggingface_hub.utils
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    huggingface_hub.utils.enable_progress_bars()  # type: ignore[attr-defined, unused-ignore]


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
