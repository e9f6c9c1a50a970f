"""Scoring completions: several reward functions, checked, weighted and added."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
import os
import threading
from collections.abc import Mapping, Sequence, Set
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
    is not a finite number, is a failure. No function is called for no completions.

    Args:
        rewards: the functions, of distinct names; those of ``async def`` share an event loop of
            their own, so that they may keep a client between calls.
        prompts, completions: N each.
        columns: lists of N values; each function gets copies.
        on_error: ``raise``, or ``skip`` the samples concerned (all N if the function raised).

    Raises:
        RewardError: naming the function, the sample and the value; its cause is the exception of
            the function, if that raised.
        ValueError: if ``prompts`` or a column has not N values, a column cannot be passed on by
            its name, or ``on_error`` is unknown.
    """
    _check_arguments(prompts, completions, columns, on_error)
    scored = ScoredRewards(torch.zeros(len(completions), dtype=torch.float64), {})
    applies = torch.zeros(len(completions), dtype=torch.bool)
    failed = torch.zeros(len(completions), dtype=torch.bool)
    for reward in rewards:
        checked, bad, errors = _score(reward, prompts, completions, columns)
        if errors and on_error == "raise":
            raise errors[0]
        scored.errors += map(str, errors)
        scored.per_function[reward.name] = checked
        failed |= bad
        applies |= ~checked.isnan()
        scored.total += reward.weight * checked.nan_to_num(nan=0.0)
    skipped = failed | ~applies
    scored.total[skipped] = math.nan
    scored.skipped = int(skipped.sum())
    return scored


def _check_arguments(
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    on_error: str,
) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    for name in ("prompts", "completions"):
        if name in columns:
            raise ValueError(f"no column may be called {name!r}: reward functions have that name")
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(completions):
            raise ValueError(
                f"{name!r} has {len(values)} values for {len(completions)} completions"
            )


def _score(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> tuple[Tensor, Tensor, list[RewardError]]:
    """Values float64 [N], NaN for None and for failures; which failed, bool [N]; and why."""
    checked = torch.full((len(completions),), math.nan, dtype=torch.float64)
    bad = torch.zeros(len(completions), dtype=torch.bool)
    if not completions:
        return checked, bad, []
    name = f"reward function {reward.name!r}"
    try:
        values = _call(reward, prompts, completions, columns)
    except Exception as error:
        failure = RewardError(f"{name} raised {type(error).__name__}: {error}")
        failure.__cause__ = error
        return checked, ~bad, [failure]
    if not isinstance(values, list):
        problem = f"{name} returned {type(values).__name__}, expected a list of numbers"
        return checked, ~bad, [RewardError(problem)]
    if len(values) != len(completions):
        problem = f"{name} returned {len(values)} values for {len(completions)} completions"
        return checked, ~bad, [RewardError(problem)]
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
                RewardError(
                    f"{name} returned {value!r} for completion {index}, "
                    "expected a finite number or None"
                )
            )
    return checked, bad, errors


def _call(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Any:
    """What the function returns: a list, or else what cannot be made one."""
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
        result = asyncio.run_coroutine_threadsafe(_wait(result), _event_loop(os.getpid())).result()
    # The items of these are no list of values, although `list` takes them.
    if isinstance(result, str | bytes | Mapping | Set) or not _is_iterable(result):
        return result
    return list(result)


async def _wait(result: Any) -> Any:
    return await result


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """An event loop in a thread: the caller's thread may run one already, as notebooks do.

    It is kept, because clients of network services are bound to the loop they were made in; but
    ``process`` is part of the key, because threads do not survive a fork.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"rewards-{process}", daemon=True).start()
    return loop


def _is_iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:  # also a tensor without dimensions
        return False
    return True


def _number(value: Any) -> float:
    """``value`` as a float, NaN if it is not a number."""
    if isinstance(value, str | bytes):  # which `float` would read
        return math.nan
    try:
        return float(value)
    except Exception:  # each library raises its own
        return math.nan
