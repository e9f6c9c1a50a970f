"""Chains of sums: what is made, and what pays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egspo.tasks import build_task
from egspo.tasks.arithmetic import Chain, make_chains, one_off, right_lines, without_carry

SMALL: dict[str, Any] = {"train_examples": 50, "validation_examples": 10, "test_examples": 20}
CHAIN = Chain(23, (18, -7, 58))
RIGHT = "23+18=41;41-07=34;34+58=92"


def test_the_solution_of_a_chain() -> None:
    assert CHAIN.key == "23+18-07+58"
    assert CHAIN.solution() == RIGHT
    assert CHAIN.results == [41, 34, 92]
    assert CHAIN.form == "23+18=__;__-07=__;__+58=__"
    assert (
        CHAIN.careless_solution() == CHAIN.solution(without_carry) == "23+18=31;31-07=34;34+58=82"
    )


def test_numbers_of_one_digit() -> None:
    chain = Chain(3, (5, -2, -6, 9), digits=1)
    assert chain.key == "3+5-2-6+9"
    assert chain.solution() == "3+5=8;8-2=6;6-6=0;0+9=9"
    assert chain.form == "3+5=_;_-2=_;_-6=_;_+9=_"
    assert chain.careless_solution() == "3+5=7;7-2=6;6-6=1;1+9=9"
    assert right_lines(chain.careless_solution(), chain) == (0, 4)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (RIGHT, (3, 3)),
        (RIGHT.replace(";", "\n") + "\n", (3, 3)),
        ("23 + 18 = 41 ; 41 - 7 = 34 ; 34 + 58 = 92", (3, 3)),
        ("23+18=31;31-07=24;24+58=82", (2, 3)),  # the slip costs its own line
        ("23+18=31;41-07=34;34+58=92", (1, 3)),  # the second does not go on from the first
        ("23+18=41;41+07=48;48+58=106", (2, 3)),  # another change than was asked for
        ("23+18=41", (1, 3)),
        (RIGHT + ";92+00=92", (3, 4)),  # a line too many
        ("23+18=41;nonsense;34+58=92", (1, 3)),
        ("", (0, 3)),
        ("41;34;92", (0, 3)),
        ("23+18=41;" * 5000, (1, 445)),
    ],
)
def test_what_is_right(text: str, score: tuple[int, int]) -> None:
    assert right_lines(text, CHAIN) == score


@given(st.integers(0, 99), st.lists(st.integers(-99, 99), min_size=1, max_size=9))
def test_the_solution_is_right_and_a_changed_result_is_not(start: int, changes: list[int]) -> None:
    chain = Chain(start, tuple(changes))
    if any(result < 0 for result in chain.results):
        return
    assert right_lines(chain.solution(), chain) == (len(changes), len(changes))
    wrong = chain.solution(lambda value, change: value + change + 1)
    assert right_lines(wrong, chain)[0] == 0


@given(st.integers(0, 9), st.integers(-9, 9).filter(bool))
def test_the_careless_solver_of_one_digit_is_never_right(value: int, change: int) -> None:
    assert one_off(value, change) in range(10)
    assert one_off(value, change) != value + change


@given(st.integers(0, 99), st.integers(-99, 99))
def test_the_careless_solver_is_right_where_nothing_is_carried(value: int, change: int) -> None:
    units = value % 10 + (1 if change >= 0 else -1) * (abs(change) % 10)
    if 0 <= value + change <= 99 and 0 <= units <= 9:
        assert without_carry(value, change) == value + change
    assert 0 <= without_carry(value, change) <= 99


def test_problems_are_distinct_and_in_one_split() -> None:
    task = build_task("arithmetic", **SMALL)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [50, 10, 20]
    keys = [e.question for part in (task.train, task.validation, task.test) for e in part]
    assert len(set(keys)) == 80
    again = build_task("arithmetic", **SMALL)
    assert [e.prompt for e in again.train] == [e.prompt for e in task.train]
    for example in task.train:
        chain = Chain(example.columns["start"], tuple(example.columns["changes"]))
        assert all(0 <= result <= 99 for result in chain.results) and 0 not in chain.changes


@pytest.mark.parametrize("largest", [2, 9, 10, 99])
def test_results_lie_within_the_largest(largest: int) -> None:
    task = build_task("arithmetic", largest=largest, changes=10, prompt_style="digits", **SMALL)
    found = set()
    for example in task.train:
        chain = Chain(example.columns["start"], tuple(example.columns["changes"]))
        found |= {chain.start, *chain.results}
        assert len(example.target or "") == (59 if largest < 10 else 89)
    assert min(found) == 0 and largest - 1 <= max(found) <= largest


@pytest.mark.parametrize(("largest", "line"), [(9, "3+5=8"), (99, "23+18=41")])
def test_the_instruction_shows_a_line_of_as_many_digits(largest: int, line: str) -> None:
    task = build_task("arithmetic", largest=largest, **SMALL)
    assert f"in the form {line} and" in task.train[0].prompt[0]["content"]


@pytest.mark.parametrize(("largest", "length"), [(9, 6 * 7 - 1), (99, 9 * 7 - 1)])
@pytest.mark.parametrize("style", ["digits", "form", "instruct"])
def test_targets_pay_in_full(style: str, largest: int, length: int) -> None:
    task = build_task("arithmetic", prompt_style=style, largest=largest, **SMALL)
    texts = [example.target for example in task.train]
    columns = {n: [e.columns[n] for e in task.train] for n in ("start", "changes")}
    (reward,) = task.rewards
    assert task.solved is not None
    assert reward.function(prompts=None, completions=texts, **columns) == [1.0] * 50
    assert task.solved(prompts=None, completions=texts, **columns) == [1.0] * 50
    assert reward.explain is not None
    assert reward.explain(texts[0], **task.train[0].columns) == "7 of 7 lines are right"
    nothing = reward.function(prompts=None, completions=["41"] * 50, **columns)
    assert nothing == [0.0] * 50
    if style != "instruct":
        assert task.characters is not None
        letters = {c for e in task.train for c in (e.target or "") + e.prompt[0]["content"]}
        assert letters <= set(task.characters)
        assert all(len(text or "") == length for text in texts)
    if style == "form":  # what the prompt gives stands where the answer has it
        for example in task.train:
            pairs = zip(example.prompt[0]["content"], example.target or "", strict=True)
            assert all(asked in ("_", told) for asked, told in pairs)


@pytest.mark.parametrize("largest", [9, 99])
def test_careless_targets_are_for_training_alone(largest: int) -> None:
    options = {"largest": largest, "prompt_style": "digits", **SMALL}
    task = build_task("arithmetic", careless=1.0, **options)
    honest = build_task("arithmetic", **options)
    assert [e.prompt for e in task.train] == [e.prompt for e in honest.train]
    assert sum(a.target != b.target for a, b in zip(task.train, honest.train, strict=True)) > 40
    assert [e.target for e in task.test] == [e.target for e in honest.test]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"changes": 0}, r"changes must be a whole number in \[1, 100\], got 0"),
        ({"changes": True}, "got True"),
        ({"largest": 100}, r"largest must be a whole number in \[1, 99\], got 100"),
        ({"largest": 0}, "got 0"),
        ({"largest": 9.0}, "got 9.0"),
        ({"careless": 1.5}, r"careless must lie in \[0, 1\], got 1.5"),
        ({"prompt_style": "digit"}, "got 'digit'"),
        ({"test_examples": 0}, "test_examples must be a whole number >= 1, got 0"),
        (
            {"train_examples": 10**6, "changes": 1},
            "1000000 more chains of 1 changes are too many of 9900",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task("arithmetic", **options)


def test_splits_share_nothing() -> None:
    task = build_task("arithmetic", **SMALL)
    chains = make_chains(2, 30, largest=99, taken={"00+01+01"}, seed=1, name="train")
    assert len({chain.key for chain in chains}) == 30
    assert task.train and not {e.question for e in task.train} & {e.question for e in task.test}
