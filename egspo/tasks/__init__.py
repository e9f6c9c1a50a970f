"""Tasks by name; importing this module registers the built-in ones."""

from egspo.tasks import sudoku_task  # noqa: F401  (registers itself)
from egspo.tasks.base import Example, Reward, RewardFunction, Task, build_task, register_task

__all__ = ["Example", "Reward", "RewardFunction", "Task", "build_task", "register_task"]
