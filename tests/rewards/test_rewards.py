"""Reward functions as users write them: what they may return, and how they may fail."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from egspo.rewards.scoring import RewardError, ScoredRewards, score_completions
from egspo.tasks import Reward

TEXTS = ["a", "bb", "ccc"]
NAN = math.nan


def returns(values: Any, name: str = "f", weight: float = 1.0) -> Reward:
    return Reward(name, lambda **_: values, weight=weight)


def score(*rewards: Reward, texts: Sequence[str] = TEXTS, **options: Any) -> ScoredRewards:
    return score_completions(rewards, ["?"] * len(texts), texts, {}, **options)


def same(actual: torch.Tensor, expected: Sequence[float]) -> bool:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return actual.dtype == torch.float64 and torch.equal(
        actual.nan_to_num(-1e9), wanted.nan_to_num(-1e9)
    )


def test_arguments_and_sum() -> None:
    def length(prompts: Any, completions: Any, bonus: Any, **_: Any) -> list[float]:
        assert prompts == [["p0"], ["p1"], ["p2"]]
        return [len(text) + more for text, more in zip(completions, bonus, strict=True)]

    rewards = [Reward("length", length, weight=2.0), returns([1, 0, -1], "sign", weight=-0.5)]
    scored = score_completions(
        rewards, [["p0"], ["p1"], ["p2"]], TEXTS, {"bonus": [0.5, 0, 0], "unused": [0, 0, 0]}
    )
    assert same(scored.total, [2.5, 4.0, 6.5])
    assert same(scored.per_function["length"], [1.5, 2.0, 3.0])
    assert same(scored.per_function["sign"], [1.0, 0.0, -1.0])
    assert (scored.skipped, scored.errors) == (0, [])


@pytest.mark.parametrize(
    "values",
    [
        (1, 0, 2.5),
        [True, False, 2.5],
        np.array([1, 0, 2.5]),
        [np.float32(1), np.int64(0), np.float16(2.5)],
        [np.bool_(True), np.bool_(False), 2.5],
        torch.tensor([1, 0, 2.5]),
        torch.tensor([1, 0, 2.5], dtype=torch.bfloat16),
        [torch.tensor(1), torch.tensor(0.0), torch.tensor(2.5)],
        [Fraction(1), Decimal(0), Decimal("2.5")],
        iter([1, 0, 2.5]),
    ],
    ids=lambda values: type(values).__name__,
)
def test_every_kind_of_number(values: Any) -> None:
    assert same(score(returns(values)).total, [1.0, 0.0, 2.5])


def test_a_generator_is_a_list() -> None:
    def f(completions: Sequence[str], **_: Any) -> Iterator[float]:
        for text in completions:
            yield float(len(text))

    assert same(score(Reward("f", f)).total, [1, 2, 3])


def test_gradients_are_left_behind() -> None:
    values = torch.ones(3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the conversion
        assert not score(returns(values)).total.requires_grad


BAD_VALUES = [
    NAN,
    math.inf,
    -math.inf,
    "1",
    "good",
    b"1",
    [1.0, 2.0],
    {"reward": 1.0},
    1j,
    10**400,
    np.nan,
    np.array([1.0, 2.0]),
    torch.tensor(NAN),
    torch.ones(2),
    pytest.param(object(), id="an object"),
]


@pytest.mark.parametrize("value", BAD_VALUES, ids=repr)
def test_bad_values(value: Any) -> None:
    reward = returns([1.0, value, 2.0])
    with pytest.raises(RewardError, match=r"reward function 'f' returned .* for completion 1"):
        score(reward)
    scored = score(reward, on_error="skip")
    assert same(scored.total, [1.0, NAN, 2.0])
    assert same(scored.per_function["f"], [1.0, NAN, 2.0])
    assert scored.skipped == 1
    assert len(scored.errors) == 1
    assert "'f'" in scored.errors[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "returned 2 values for 3 completions"),
        ([1.0] * 4, "returned 4 values for 3 completions"),
        ([], "returned 0 values for 3 completions"),
        (None, "returned NoneType, expected a list of numbers"),
        (1.0, "returned float, expected a list"),
        ("111", "returned str, expected a list"),
        ({0: 1, 1: 1, 2: 1}, "returned dict, expected a list"),
        ({0.0, 1.0, 2.0}, "returned set, expected a list"),
        (torch.tensor(1.0), "returned Tensor, expected a list"),
    ],
)
def test_bad_lists(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=rf"^reward function 'f' {message}"):
        score(returns(values))
    scored = score(returns(values), on_error="skip")
    assert same(scored.total, [NAN] * 3)
    assert scored.skipped == 3
    assert len(scored.errors) == 1


def test_an_exception_is_the_cause() -> None:
    def f(**_: Any) -> list[float]:
        raise KeyError("gold")

    with pytest.raises(RewardError, match="reward function 'f' raised KeyError: 'gold'") as info:
        score(Reward("f", f))
    assert isinstance(info.value.__cause__, KeyError)
    assert same(score(Reward("f", f), on_error="skip").total, [NAN] * 3)


def test_an_exception_inside_a_generator() -> None:
    def f(**_: Any) -> Iterator[float]:
        yield 1.0
        raise ValueError("half way")

    with pytest.raises(RewardError, match="raised ValueError: half way"):
        score(Reward("f", f))


def test_interrupts_pass() -> None:
    def f(**_: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Reward("f", f), on_error="skip")


def test_none_does_not_apply() -> None:
    scored = score(
        returns([None, 1.0, None], "a", weight=3.0),
        returns([2.0, None, None], "b"),
        on_error="raise",
    )
    assert same(scored.total, [2.0, 3.0, NAN])
    assert same(scored.per_function["a"], [NAN, 1.0, NAN])
    assert (scored.skipped, scored.errors) == (1, [])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_sample_that_one_function_fails_on_is_skipped(order: tuple[int, int]) -> None:
    rewards = [returns([1.0, 1.0, 1.0], "good"), returns([5.0, NAN, None], "bad")]
    scored = score(*(rewards[i] for i in order), on_error="skip")
    assert same(scored.total, [6.0, NAN, 1.0])
    assert same(scored.per_function["good"], [1.0, 1.0, 1.0])
    assert same(scored.per_function["bad"], [5.0, NAN, NAN])
    assert scored.skipped == 1


def test_every_failure_is_reported() -> None:
    scored = score(returns([NAN, 1, NAN], "a"), returns([1], "b"), on_error="skip")
    assert [error.split("'")[1] for error in scored.errors] == ["a", "a", "b"]
    assert scored.skipped == 3


def test_functions_cannot_change_their_arguments() -> None:
    prompts = [[{"role": "user", "content": str(i)}] for i in range(3)]
    columns = {"tests": [["x"], ["y"], ["z"]]}
    texts = list(TEXTS)
    seen = []

    def vandal(prompts: Any, completions: Any, tests: Any) -> list[float]:
        seen.append((str(prompts), str(completions), str(tests)))
        prompts[0][0]["content"] = "changed"
        completions.clear()
        tests[1].append("changed")
        return [1.0] * 3

    score_completions([Reward("a", vandal), Reward("b", vandal)], prompts, texts, columns)
    assert seen[0] == seen[1]
    assert texts == TEXTS
    assert prompts[0][0]["content"] == "0"
    assert columns == {"tests": [["x"], ["y"], ["z"]]}


def test_an_empty_batch_calls_nothing() -> None:
    def f(completions: Sequence[str], **_: Any) -> list[float]:
        raise AssertionError("called")

    scored = score(Reward("f", f), texts=[])
    assert scored.total.shape == scored.per_function["f"].shape == (0,)
    assert scored.total.dtype == torch.float64
    assert (scored.skipped, scored.errors) == (0, [])


def test_no_functions() -> None:
    scored = score()
    assert same(scored.total, [NAN] * 3)
    assert scored.skipped == 3


@pytest.mark.parametrize(
    ("prompts", "columns", "options", "message"),
    [
        (["?"] * 2, {}, {}, "'prompts' has 2 values for 3 completions"),
        (["?"] * 3, {"gold": [1] * 4}, {}, "'gold' has 4 values for 3 completions"),
        (["?"] * 3, {"completions": TEXTS}, {}, "no column may be called 'completions'"),
        (["?"] * 3, {"prompts": TEXTS}, {}, "no column may be called 'prompts'"),
        (["?"] * 3, {}, {"on_error": "ignore"}, "on_error .*'ignore'"),
    ],
)
def test_bad_arguments(
    prompts: list[str], columns: dict[str, list[Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_completions([returns([1] * 3)], prompts, TEXTS, columns, **options)


# --- async def


async def lengths(completions: Sequence[str], **_: Any) -> list[float]:
    parts = [asyncio.sleep(0, float(len(text))) for text in completions]
    return list(await asyncio.gather(*parts))


async def broken(**_: Any) -> list[float]:
    await asyncio.sleep(0)
    raise OSError("no network")


async def cancelled(**_: Any) -> list[float]:
    raise asyncio.CancelledError


def test_async_functions() -> None:
    assert same(score(Reward("f", lengths), returns([1, 1, 1], "g")).total, [2, 3, 4])
    with pytest.raises(RewardError, match="'f' raised OSError: no network") as info:
        score(Reward("f", broken))
    assert isinstance(info.value.__cause__, OSError)
    assert score(Reward("f", broken), on_error="skip").skipped == 3


def test_a_cancelled_async_function_failed() -> None:
    with pytest.raises(RewardError, match="'f' raised CancelledError"):
        score(Reward("f", cancelled))


def test_async_functions_inside_a_running_event_loop() -> None:
    async def notebook() -> ScoredRewards:
        return score(Reward("f", lengths))

    assert same(asyncio.run(notebook()).total, [1, 2, 3])


def test_async_functions_may_keep_what_belongs_to_their_event_loop() -> None:
    """As clients of network services do."""
    loops = set()
    queue: asyncio.Queue[int] = asyncio.Queue()

    async def f(completions: Sequence[str], **_: Any) -> list[float]:
        loops.add(asyncio.get_running_loop())
        waiting = asyncio.ensure_future(queue.get())  # binds the queue to the loop
        await asyncio.sleep(0)
        await queue.put(1)
        return [float(await waiting)] * len(completions)

    for _ in range(3):
        assert same(score(Reward("f", f)).total, [1, 1, 1])
    assert len(loops) == 1


def test_no_thread_is_left_per_call() -> None:
    score(Reward("f", lengths))
    before = threading.active_count()
    for _ in range(3):
        score(Reward("f", lengths))
    assert threading.active_count() == before


# --- threads, time limits, duplicates


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_function_that_exits_has_failed(on_error: Any) -> None:
    def f(**_: Any) -> list[float]:
        raise SystemExit(3)

    if on_error == "raise":
        with pytest.raises(RewardError, match="'f' raised SystemExit: 3"):
            score(Reward("f", f))
    else:
        assert score(Reward("f", f), on_error="skip").skipped == 3


def test_functions_run_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=10)

    def meet(completions: Sequence[str], **_: Any) -> list[float]:
        barrier.wait()
        return [1.0] * len(completions)

    async def meet_later(completions: Sequence[str], **_: Any) -> list[float]:
        await asyncio.to_thread(barrier.wait)
        return [2.0] * len(completions)

    scored = score(Reward("a", meet), Reward("b", meet_later), Reward("c", meet))
    assert same(scored.total, [4, 4, 4])
    assert list(scored.per_function) == ["a", "b", "c"]


def test_a_function_that_hangs_has_failed() -> None:
    over = threading.Event()

    def hang(**_: Any) -> list[float]:
        over.wait(60)
        return [9.0] * 3

    rewards = [Reward("slow", hang, timeout=0.05), returns([1, 2, 3], "quick")]
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"^reward function 'slow' did not return within 0.05 s$"):
        score(*rewards)
    scored = score(*rewards, on_error="skip")
    assert time.monotonic() - start < 5
    over.set()
    assert same(scored.total, [NAN] * 3)
    assert same(scored.per_function["quick"], [1, 2, 3])
    assert scored.skipped == 3


def test_a_coroutine_that_hangs_is_cancelled() -> None:
    cancelled = threading.Event()

    async def hang(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return []

    assert score(Reward("f", hang, timeout=0.05), on_error="skip").skipped == 3
    assert cancelled.wait(5)
    assert same(score(Reward("f", lengths)).total, [1, 2, 3])


def test_a_coroutine_that_blocks_its_loop_blocks_no_other() -> None:
    over = threading.Event()

    async def block(**_: Any) -> list[float]:
        over.wait(60)
        return []

    assert score(Reward("f", block, timeout=0.05), on_error="skip").skipped == 3
    assert same(score(Reward("f", lengths, timeout=5)).total, [1, 2, 3])
    over.set()


def test_a_timeout_of_the_function_is_its_own() -> None:
    def f(**_: Any) -> list[float]:
        raise TimeoutError("the judge is busy")

    with pytest.raises(RewardError, match="'f' raised TimeoutError: the judge is busy"):
        score(Reward("f", f))


@pytest.mark.parametrize("timeout", [0, -1.0, NAN])
def test_bad_time_limits(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout of reward 'f' must be > 0"):
        Reward("f", lengths, timeout=timeout)


def test_duplicates_are_scored_once() -> None:
    seen = []

    def f(prompts: Any, completions: Any, gold: Any) -> list[float]:
        seen.append(list(zip(prompts, completions, gold, strict=True)))
        return [float(len(seen[-1]) - i) for i in range(len(completions))]

    prompts = ["p", "p", "q", "p", "p", "p"]
    texts = ["a", "b", "a", "a", "a", "b"]
    gold = [[1], [1], [1], [1], [2], [1]]
    scored = score_completions([Reward("f", f)], prompts, texts, {"gold": gold})
    assert seen == [[("p", "a", [1]), ("p", "b", [1]), ("q", "a", [1]), ("p", "a", [2])]]
    assert same(scored.total, [4, 3, 2, 4, 1, 3])


def test_what_cannot_be_compared_is_no_duplicate() -> None:
    unlike = [np.array([1.0, 2.0]), np.array([1.0, 3.0]), np.array([1.0, 2.0])]
    locks = [threading.Lock()] * 3  # cannot be pickled, nor copied
    assert same(rows_seen(unlike), [2, 2, 2])
    with pytest.raises(TypeError, match="pickle"):
        rows_seen(locks)
    assert same(rows_seen([lambda: 1] * 3), [3, 3, 3])


def rows_seen(column: Sequence[Any]) -> torch.Tensor:
    def f(completions: Sequence[str], **_: Any) -> list[float]:
        return [len(completions)] * len(completions)

    texts = ["same"] * len(column)
    return score_completions([Reward("f", f)], texts, texts, {"x": column}).total


def test_failures_of_duplicates() -> None:
    scored = score(returns([1.0, NAN]), texts=["a", "b", "b"], on_error="skip")
    assert same(scored.total, [1.0, NAN, NAN])
    assert scored.skipped == 2
    assert len(scored.errors) == 1
    with pytest.raises(RewardError, match="for completion 2,"):
        score(returns([1.0, NAN]), texts=["a", "a", "b"])
    with pytest.raises(RewardError, match="returned 3 values for 2 distinct completions"):
        score(returns([1.0, 1.0, 1.0]), texts=["a", "b", "b"])


def test_an_async_generator_is_no_list() -> None:
    async def f(**_: Any) -> Any:
        yield 1.0

    with pytest.raises(RewardError, match="returned async_generator, expected a list"):
        score(Reward("f", f))
