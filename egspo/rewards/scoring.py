"""Scoring completions: several reward functions, checked, weighted and added."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from egspo.rewards.calls import RewardCall, RewardTimeout
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

    def only(self, rewards: Sequence[Reward]) -> list[ScoredRewards | None]:
        """Of each sample, as if these functions alone had scored it.

        None where that is not known: the sample was skipped, perhaps by a failure.
        """
        values = torch.stack([self.per_function[r.name] for r in rewards])
        weights = torch.tensor([[r.weight] for r in rewards], dtype=torch.float64)
        total = (weights * values).nansum(0).where(~values.isnan().all(0), math.nan)
        return [
            None
            if self.total[i].isnan()
            else ScoredRewards(
                total[i : i + 1],
                {r.name: self.per_function[r.name][i : i + 1] for r in rewards},
                int(total[i].isnan()),
            )
            for i in range(len(self.total))
        ]

    @staticmethod
    def join(
        names: Sequence[str], parts: Sequence[tuple[list[int], ScoredRewards]], count: int
    ) -> ScoredRewards:
        """The rewards of ``count`` samples from those of some at the places given.

        Args:
            names: of the functions.
            parts: places, and the rewards of the samples there; every place once.
            count: of all samples.
        """
        joined = ScoredRewards(
            torch.full((count,), math.nan, dtype=torch.float64),
            {name: torch.full((count,), math.nan, dtype=torch.float64) for name in names},
        )
        for places, part in parts:
            joined.total[places] = part.total
            for name, values in part.per_function.items():
                joined.per_function[name][places] = values
            joined.skipped += part.skipped
            joined.errors += part.errors
        return joined


def score_completions(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    on_error: Literal["raise", "skip"] = "raise",
) -> ScoredRewards:
    """Call every reward function as ``f(prompts=, completions=, **columns)`` and add up.

    The functions run at the same time, each in a thread, and see every distinct sample (prompt,
    completion and columns) once. A value of None does not apply to its sample and adds nothing; a
    sample to which nothing applies is skipped. A function that raises, takes longer than its
    ``timeout``, returns another number of values, or a value that is not a finite number, is a
    failure. No function is called for no completions.

    Args:
        rewards: the functions, of distinct names; those of ``async def`` share an event loop of
            their own, so that they may keep a client between calls.
        prompts, completions: N each.
        columns: lists of N values; each function gets copies.
        on_error: ``raise``, or ``skip`` the samples concerned (all N if the function raised).

    Raises:
        RewardError: naming the function, the sample and the value; its cause is the exception of
            the function, if that raised. Of several failures, that of the first in ``rewards``.
        ValueError: if ``prompts`` or a column has not N values, a column cannot be passed on by
            its name, or ``on_error`` is unknown.
    """
    _check_arguments(prompts, completions, columns, on_error)
    samples = _Samples.distinct(prompts, completions, columns)
    calls = [RewardCall(reward, samples.arguments()) for reward in rewards if completions]
    outcomes = [_outcome(call, samples) for call in calls] or [_nothing(0) for _ in rewards]
    scored = ScoredRewards(torch.zeros(len(completions), dtype=torch.float64), {})
    applies = torch.zeros(len(completions), dtype=torch.bool)
    failed = torch.zeros(len(completions), dtype=torch.bool)
    for reward, (distinct, bad, errors) in zip(rewards, outcomes, strict=True):
        if errors and on_error == "raise":
            raise errors[0]
        checked = distinct[samples.place]
        scored.errors += map(str, errors)
        scored.per_function[reward.name] = checked
        failed |= bad[samples.place]
        applies |= ~checked.isnan()
        scored.total += reward.weight * checked.nan_to_num(nan=0.0)
    skipped = failed | ~applies
    scored.total[skipped] = math.nan
    scored.skipped = int(skipped.sum())
    return scored


@dataclass(frozen=True)
class _Samples:
    """The D distinct ones of N samples."""

    prompts: list[Any]
    completions: list[str]
    columns: dict[str, list[Any]]
    first: list[int]
    """Number of the first of the N that each of the D is."""
    place: Tensor
    """int64 [N], which of the D each of the N is."""

    @classmethod
    def distinct(
        cls,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> _Samples:
        keys = [
            _key(index, prompts[index], completion, [column[index] for column in columns.values()])
            for index, completion in enumerate(completions)
        ]
        first_of: dict[Any, int] = {}
        for index, key in enumerate(keys):
            first_of.setdefault(key, index)
        places = {key: place for place, key in enumerate(first_of)}
        first = list(first_of.values())
        return cls(
            [prompts[i] for i in first],
            [completions[i] for i in first],
            {name: [values[i] for i in first] for name, values in columns.items()},
            first,
            torch.tensor([places[key] for key in keys], dtype=torch.int64),
        )

    def arguments(self) -> dict[str, Any]:
        """Copies, so that a function that changes its arguments changes nothing of ours."""
        return copy.deepcopy(
            {"prompts": self.prompts, "completions": self.completions, **self.columns}
        )


def _key(index: int, prompt: Any, completion: str, columns: list[Any]) -> Any:
    """Equal for equal samples only. What cannot be pickled counts as unlike everything else."""
    try:
        return completion, pickle.dumps((prompt, columns))
    except Exception:  # each class raises its own
        return index


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


_Outcome = tuple[Tensor, Tensor, list[RewardError]]
"""Values float64 [D], NaN for None and for failures; which failed, bool [D]; and why."""


def _nothing(count: int) -> _Outcome:
    values = torch.full((count,), math.nan, dtype=torch.float64)
    return values, torch.zeros(count, dtype=torch.bool), []


def _outcome(call: RewardCall, samples: _Samples) -> _Outcome:
    """Wait for the call, and check what it returned."""
    count = len(samples.completions)
    checked, bad, errors = _nothing(count)
    name = f"reward function {call.reward.name!r}"
    try:
        values = call.result()
    except RewardTimeout as error:
        return checked, ~bad, [RewardError(f"{name} {error}")]
    except (Exception, SystemExit) as error:
        failure = RewardError(f"{name} raised {type(error).__name__}: {error}")
        failure.__cause__ = error
        return checked, ~bad, [failure]
    if not isinstance(values, list):
        problem = f"{name} returned {type(values).__name__}, expected a list of numbers"
        return checked, ~bad, [RewardError(problem)]
    if len(values) != count:
        repeated = " distinct" if count < len(samples.place) else ""
        problem = f"{name} returned {len(values)} values for {count}{repeated} completions"
        return checked, ~bad, [RewardError(problem)]
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
                    f"{name} returned {value!r} for completion {samples.first[index]}, "
                    "expected a finite number or None"
                )
            )
    return checked, bad, errors


def _number(value: Any) -> float:
    """``value`` as a float, NaN if it is not a number."""
    if isinstance(value, str | bytes):  # which `float` would read
        return math.nan
    try:
        return float(value)
    except Exception:  # each library raises its own
        return math.nan
