"""What commands share: how one is added, and what training commands show."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from egspo.tasks import Task

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


def load_tasks_of(file: str | None) -> None:
    """Register the tasks of a Python file, if there is one."""
    from egspo.tasks import load_task_file

    if file is not None:
        load_task_file(file)


def named_task(name: str, options: Sequence[str]) -> Task:
    """The task of that name with ``key=value`` options, or of a recipe with overrides."""
    from egspo.config import TaskConfig
    from egspo.config.recipe import load_config, read_overrides
    from egspo.tasks.prompts import recipe_task

    if Path(name).suffix in (".yaml", ".yml"):
        config = load_config(name, options).task
    else:
        config = TaskConfig(name=name, options=read_overrides(options))
    return recipe_task(config)
