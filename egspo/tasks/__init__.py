"""Tasks by name; importing this module registers the built-in ones."""

from egspo.tasks import sudoku_task  # noqa: F401  (registers itself)
from egspo.tasks.base import (
    Example,
    Reward,
    RewardFunction,
    Task,
    build_task,
    register_task,
    registered_tasks,
)
from egspo.tasks.files import TaskFileError, load_task_file

__all__ = [
    "Example",
    "Reward",
    "RewardFunction",
    "Task",
    "TaskFileError",
    "build_task",
    "load_task_file",
    "register_task",
    "registered_tasks",
]
