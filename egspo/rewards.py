"""Scoring completions: several reward functions, checked, weighted and added."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from egspo.tasks.base import Reward


class RewardError(RuntimeError):
    """A reward function failed, or returned what is not a reward."""


@dataclass
class ScoredRewards:
    """Rewards of N completions."""

    total: Tensor
    """float64 [N], weighted sum; NaN where the sample was skipped."""
    per_function: dict[str, Tensor]
    """float64 [N] by reward name, unweighted; NaN where it failed or does not apply."""
    skipped: int = 0
    errors: list[str] = field(default_factory=list)
    """What went wrong, where failures are skipped."""


def score_completions(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    on_error: Literal["raise", "skip"] = "raise",
) -> ScoredRewards:
    """Call every reward function as ``f(prompts=, completions=, **columns)`` and add up.

    A value of None does not apply to its sample and adds nothing; a sample to which nothing
    applies is skipped. A function that raises, returns another number of values, or a value that
    is not a finite number, is a failure.

    Args:
        rewards: the functions.
        prompts, completions: N each.
        columns: lists of N values.
        on_error: ``raise``, or ``skip`` the samples concerned (all N if the function raised).

    Raises:
        RewardError: naming the function, the sample and the value.
    """
    scored = ScoredRewards(torch.zeros(len(completions), dtype=torch.float64), {})
    applies = torch.zeros(len(completions), dtype=torch.bool)
    failed = torch.zeros(len(completions), dtype=torch.bool)
    for reward in rewards:
        checked, bad, errors = _score(reward, prompts, completions, columns)
        if errors and on_error == "raise":
            raise RewardError(errors[0])
        scored.errors += errors
        scored.per_function[reward.name] = checked
        failed |= bad
        applies |= ~checked.isnan()
        scored.total += reward.weight * checked.nan_to_num(nan=0.0)
    skipped = failed | ~applies
    scored.total[skipped] = math.nan
    scored.skipped = int(skipped.sum())
    return scored


def _score(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> tuple[Tensor, Tensor, list[str]]:
    """Values float64 [N], NaN for None and for failures; which failed, bool [N]; and why."""
    checked = torch.full((len(completions),), math.nan, dtype=torch.float64)
    bad = torch.zeros(len(completions), dtype=torch.bool)
    name = f"reward function {reward.name!r}"
    try:
        values = _call(reward, prompts, completions, columns)
    except Exception as error:
        return checked, ~bad, [f"{name} raised {type(error).__name__}: {error}"]
    if len(values) != len(completions):
        problem = f"{name} returned {len(values)} values for {len(completions)} completions"
        return checked, ~bad, [problem]
    errors = []
    for index, value in enumerate(values):
        number = None if value is None else _number(value)
        if number is None:
            continue
        if math.isfinite(number):
            checked[index] = number
        else:
            bad[index] = True
            errors.append(
                f"{name} returned {value!r} for completion {index}, "
                "expected a finite number or None"
            )
    return checked, bad, errors


def _call(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[Any]:
    # Copies, so that a function that changes its arguments changes nothing of ours.
    arguments = copy.deepcopy(
        {
            "prompts": list(prompts),
            "completions": list(completions),
            **{name: list(values) for name, values in columns.items()},
        }
    )
    result = reward.function(**arguments)
    if inspect.isawaitable(result):
        result = asyncio.run(_wait(result))
    return list(result)


async def _wait(result: Any) -> Any:
    return await result


def _number(value: Any) -> float:
    """``value`` as a float, NaN if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
