"""What it is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from egspo.config.options.checks import require


@dataclass
class TaskConfig:
    """The task by registered name; ``options`` go to its builder."""

    name: str = "sudoku"
    """A task of the package, or one that ``file`` registers."""
    file: str | None = None
    """Python file that registers the task; like every path of a recipe, relative to the working
    directory. A run keeps a copy, and only continues with the same content."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the task's builder; ``egspo data show TASK`` lists them."""
    max_prompt_tokens: int | None = None
    """Training prompts are cut to their last so many tokens, chat format and all, as the published
    code does at 200; null never cuts."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights by reward name; rewards not named keep the task's."""
    intermediate_rewards: list[str] | None = None
    """Names of the rewards that score the one-step completions of EGSPO-SA; None for those that
    the task itself says."""
    on_reward_error: Literal["raise", "skip"] = "raise"
    """``skip`` leaves the sample out of the update, counts it and reports it."""
    reward_timeout: float | None = None
    """Seconds that one call of a reward function may take before it counts as failed; null keeps
    each function's own limit (300 unless the task says otherwise)."""

    def __post_init__(self) -> None:
        most = self.max_prompt_tokens
        require(
            most is None or most > 0,
            f"task.max_prompt_tokens must be > 0, or null to never cut a prompt, got {most}",
        )
        require(
            self.reward_timeout is None or self.reward_timeout > 0,
            "task.reward_timeout must be > 0, or null for each reward's own, "
            f"got {self.reward_timeout}",
        )
