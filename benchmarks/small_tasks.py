"""The small tasks that studies train on: recipes, and what a study changes in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class SmallTask:
    """A recipe with the overrides of every study."""

    recipe: str
    title: str
    overrides: tuple[str, ...]

    @property
    def path(self) -> Path:
        return RECIPES / f"{self.recipe}.yaml"


SUDOKU = SmallTask(
    "sudoku_tiny",
    "4x4 Sudoku, 16 steps",
    # A token a step; a warm start and a run that take minutes: the recipe's own take longer.
    (
        *("generation.steps=16", "steps=40", "prompts_per_step=8", "eval.every=20"),
        *("task.options.train_examples=8000", "sft.steps=400", "sft.batch_size=32"),
        "sft.optimizer.learning_rate=2.0e-3",
    ),
)
COUNTDOWN = SmallTask(
    "countdown_tiny",
    "Countdown, 8 steps",
    ("steps=40", "prompts_per_step=8", "eval.every=20", "sft.steps=500"),
)
ARITHMETIC = SmallTask("arithmetic_tiny", "Chains of sums, 64 steps, dual cache", ())
