"""Tasks by name; importing this module registers the built-in ones."""

from egspo.tasks import (  # noqa: F401  (they register)
    arithmetic_task,
    countdown_task,
    gsm8k,
    humaneval,
    kodcode,
    math500,
    mbpp,
    sudoku_task,
)
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
