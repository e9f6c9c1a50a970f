"""Countdown: a checker that evaluates nothing, problems that are solvable, splits that are not
shared."""

from __future__ import annotations

import json
import random
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egspo.models.tokenization import character_tokenizer, encode_prompts
from egspo.tasks import build_task
from egspo.tasks.countdown import (
    evaluate,
    make_problem,
    random_expression,
    solve,
    uses_numbers,
)
from egspo.tasks.countdown_task import extract_expression, score, whole_expression
from tests.tasks.hostile import HUGE, SMALL


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("7/2", Fraction(7, 2)),
        ("1/3*3", 1),
        ("-3+5", 2),
        (" 1 + 2 ", 3),
        ("8-3-2", 3),
        ("1/0", None),
        ("1/(2-2)", None),
    ],
)
def test_values_are_exact(expression: str, value: Any) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", " ", "1+", "2**3", "9**9**9", "7//2", "7%2", "1.5", "1e3", "0x1", "1_0", "01+2"),
        *("3(4)", "(1,2)", "[1]", "x", "1+x", "1;2", "1\n2", "1#2", "1<2", "1 if 1 else 2", "()"),
        *("lambda:1", "３+４", "٣+٤", "1²", "True+1", "__import__('os')", "1+2=3", "'1'+'2'"),
        *("(" * 150 + "1", "1" * 300, "+".join(["1"] * 200), "-" * 300 + "1"),
    ],
)
def test_what_is_no_expression(expression: str) -> None:
    assert evaluate(expression) is None
    assert not uses_numbers(expression, [1, 2])


@pytest.mark.parametrize("depth", [50, 100, 127])
def test_deep_expressions(depth: int) -> None:
    """Whether or not the parser takes them: an answer, never a crash."""
    assert evaluate("(" * depth + "1" + ")" * depth) in (1, None)
    assert evaluate("-" * depth + "1") in (1, -1, None)
    assert evaluate("+".join("1" * depth)) in (depth, None)
    assert evaluate("1-(" * (depth // 2) + "1" + ")" * (depth // 2)) in (0, 1, None)


@pytest.mark.parametrize(
    ("expression", "uses"),
    [
        ("3*7+5", True),
        ("5+7*3", True),
        ("3*7", False),
        ("3*7+5+5", False),
        ("3+3+7", False),
        ("37+5", False),
        ("3*7+5-0", False),
        ("-3*7+5", True),
    ],
)
def test_every_number_exactly_once(expression: str, uses: bool) -> None:
    assert uses_numbers(expression, [3, 5, 7]) is uses
    assert uses_numbers("4+4", [4, 4]) and not uses_numbers("4", [4, 4])


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<answer>3*7+5</answer>", 1.0),
        ("<answer>3*7+5 = 26</answer>", 1.0),
        ("<answer>\\boxed{3 \\times 7 + 5}</answer>", 1.0),
        # Answers are in closed tags; a box is no substitute.
        ("\\boxed{3 \\times 7 + 5}", 0.0),
        ("<answer>3*7+5", 0.0),
        ("<answer>7×3+5</answer>", 1.0),
        ("<answer>(5 − (0 - 7))*3</answer>", 0.0),
        ("<answer>3*7-5</answer>", 0.1),
        ("<answer>3/(7-5)</answer>", 0.1),
        ("<answer>3/(7-7)</answer>", 0.0),
        ("<answer>26</answer>", 0.0),
        ("<answer>3*7+5</answer> <answer>26</answer>", 0.0),
        # What an equation states must be true, on every side.
        ("<answer>26=3*7+5</answer>", 1.0),
        ("<answer>3*7+5 = 21+5 = 26</answer>", 1.0),
        ("<answer>3*7+5 = 27</answer>", 0.1),
        ("<answer>27 = 3*7+5</answer>", 0.1),
        ("<answer>3*7+5 = 21+6 = 26</answer>", 0.1),
        ("<answer>3*7-5 = 26</answer>", 0.1),
        ("<answer>3*7+5 = 26 apples</answer>", 0.0),
        ("<answer>3*7+5 =</answer>", 0.0),
        ("<answer>26 = 26</answer>", 0.0),
        # No power, no implicit product, no list, no prose.
        ("<answer>3 ** 7 + 5</answer>", 0.0),
        ("<answer>3(7)+5</answer>", 0.0),
        ("<answer>[3, 7, 5]</answer>", 0.0),
        ("<answer>The expression is 3*7+5</answer>", 0.0),
        ("<answer>3*7+5 or 5+3*7</answer>", 0.0),
        ("3*7+5", 0.0),
        ("", 0.0),
    ],
)
def test_the_published_values(completion: str, value: float) -> None:
    task = build_task("countdown", train_examples=1, test_examples=1, validation_examples=1)
    sample = {"prompts": ["?"], "completions": [completion], "nums": [[3, 5, 7]], "target": [26]}
    assert task.rewards[0].function(**sample) == [value]
    assert task.solved is not None
    assert task.solved(**sample) == [float(value == 1)]


OPERATORS = {
    "+": ["+", " + ", "\uff0b"],
    "-": ["-", " - ", "\u2212", "\u2013"],
    "*": ["*", " \\times ", "\\cdot ", " \u00d7 ", "\u00b7", "x", " x ", "X", "\u22c5"],
    "/": ["/", " \\div ", "\u00f7", " / "],
}
BRACKETS = [("(", ")"), ("[", "]"), ("\\left( ", " \\right)"), ("\\left[", "\\right]"), ("{", "}")]
WRAPPERS = ["{}", " {}\n", "`{}`", "```\n{}\n```", "**{}**", "${}$", "$$ {} $$", "\\( {} \\)"]
WRAPPERS += ["\\[{}\\]", "\\boxed{{{}}}", "{}.", '"{}"']


@st.composite
def spelled(draw: st.DrawFn, nums: list[int]) -> tuple[str, Fraction | None]:
    """An expression of all numbers, and its value: each operation and bracket spelled anyhow."""
    terms = [(str(number), Fraction(number)) for number in draw(st.permutations(nums))]
    while len(terms) > 1:
        (left, a), (right, b) = terms.pop(), terms.pop()
        operator = draw(st.sampled_from("+-*/"))
        if operator == "/" and b == 0:
            return "1/0", None
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[operator]
        if operator == "/" and draw(st.booleans()):
            text = f"\\{draw(st.sampled_from(['frac', 'dfrac']))}{{{left}}}{{{right}}}"
        else:
            text = f"{left}{draw(st.sampled_from(OPERATORS[operator]))}{right}"
        opened, closed = draw(st.sampled_from(BRACKETS))
        terms.insert(0, (f"{opened}{text}{closed}", value))
    return terms[0]


@given(st.data(), st.lists(st.integers(1, 99), min_size=2, max_size=4))
def test_every_spelling_of_an_expression_is_read(data: st.DataObject, nums: list[int]) -> None:
    text, value = data.draw(spelled(nums))
    if value is None or value.denominator != 1:
        return
    target = int(value)
    wrapper = data.draw(st.sampled_from(WRAPPERS))
    whole = data.draw(st.sampled_from(["{}", "{} = {v}", "{v} = {}", "{}={v}+0={v}"]))
    stated = wrapper.format(whole.format(text, v=target))
    assert score(extract_expression(f"<answer>{stated}</answer>"), nums, target) == 1.0
    assert score(extract_expression(f"<answer>{stated}</answer>"), nums, target + 1) == 0.1
    assert score(extract_expression(f"<answer>{stated}</answer>"), [*nums, 1], target) == 0.0
    assert score(extract_expression(f"<answer>{stated}"), nums, target) == 0.0
    false = wrapper.format(f"{text} = {target + 1}")
    assert score(extract_expression(f"<answer>{false}</answer>"), nums, target) == 0.1


def test_division_by_zero_is_a_wrong_value() -> None:
    assert score("5/(3-3)", [3, 3, 5], 1) == 0.1


@pytest.mark.parametrize("extract", [extract_expression, whole_expression])
def test_hostile_completions_are_paid_nothing(extract: Any) -> None:
    for text in (*SMALL.values(), *HUGE.values()):
        start = time.process_time()
        assert score(extract(text), [9, 9, 9], 42) == 0.0
        assert time.process_time() - start < 1.0


@given(st.randoms(use_true_random=False), st.integers(2, 4))
def test_written_expressions_have_their_value(rng: random.Random, count: int) -> None:
    nums = [rng.randint(1, 9) for _ in range(count)]
    term = random_expression(nums, rng)
    if term is not None:
        assert evaluate(term.text) == term.value
        assert uses_numbers(term.text, nums)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_made_problems_are_solvable(count: int) -> None:
    rng = random.Random(count)
    for _ in range(20 if count < 4 else 5):
        problem = make_problem(count, 30, (1, 99), rng)
        assert 1 <= problem.target <= 99
        for expression in (problem.solution, solve(problem.nums, problem.target)):
            assert expression is not None
            assert score(expression, problem.nums, problem.target) == 1.0


@pytest.mark.parametrize(
    ("nums", "target", "solvable"),
    [([3, 5, 7], 26, True), ([1, 1, 1], 9, False), ([8, 3, 8, 3], 24, True), ([2, 4], 7, False)],
)
def test_the_solver(nums: list[int], target: int, solvable: bool) -> None:
    found = solve(nums, target)  # 8/(3-8/3) needs fractions
    assert (found is not None) is solvable
    assert found is None or score(found, nums, target) == 1.0


# --- the task


def keys(examples: Any) -> list[str]:
    return [example.question for example in examples]


def test_made_splits_share_nothing() -> None:
    options: dict[str, Any] = {"largest": 9, "targets": [1, 30], "prompt_style": "digits"}
    task = build_task("countdown", train_examples=500, test_examples=100, **options)
    parts = [keys(part) for part in (task.train, task.validation, task.test)]
    assert [len(part) for part in parts] == [500, 128, 100]
    assert len(set(parts[1])) == 128 and len(set(parts[2])) == 100
    assert not set(parts[0]) & set(parts[1]) and not set(parts[1]) & set(parts[2])
    assert not set(parts[0]) & set(parts[2])
    more = build_task("countdown", train_examples=600, test_examples=100, **options)
    assert more.train[:500] == task.train
    assert more.test == task.test
    other = build_task("countdown", train_examples=500, test_examples=100, seed=1, **options)
    assert keys(other.test) != parts[2]


def test_digits_are_in_the_alphabet_and_solve_themselves() -> None:
    task = build_task(
        "countdown", prompt_style="digits", train_examples=50, largest=9, careless=0.5
    )
    assert task.characters is not None
    tokenizer = character_tokenizer(task.characters)
    encode_prompts(tokenizer, [e.prompt for e in (*task.train, *task.test)])
    values = []
    for example in task.train:
        assert example.target is not None
        assert tokenizer.unk_token_id not in tokenizer(example.target)["input_ids"]
        values += task.rewards[0].function(
            prompts=["?"],
            completions=[example.target],
            **{name: [value] for name, value in example.columns.items()},
        )
    assert set(values) == {0.1, 1.0}
    assert 15 < values.count(1.0) < 45
    assert task.extract is not None and task.extract("3+4=7") == "3+4=7"


def test_problems_of_a_source(tmp_path: Path) -> None:
    rows = [{"nums": [3, 5, i], "target": i} for i in range(1, 40)]
    rows += [{"nums": [i, 5, 3], "target": i} for i in range(1, 40)]  # the same ones
    rows += [{"nums": [1, 2, 3, 4], "target": 10}]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = build_task("countdown", train=str(file), validation_examples=5, test_examples=10)
    parts = [keys(part) for part in (task.train, task.validation, task.test)]
    assert [len(part) for part in parts] == [48, 10, 20]
    assert [len(set(part)) for part in parts] == [24, 5, 10]
    assert "[3, 5, " in task.train[0].prompt[0]["content"]
    assert task.train[0].target is None
    with pytest.raises(ValueError, match=r"all of its questions are in .*train\.jsonl as well"):
        build_task("countdown", train=str(file), test=str(file), validation_examples=0)
    with pytest.raises(ValueError, match="none of its 79 rows is of the kind asked for"):
        build_task("countdown", train=str(file), numbers=5)


@pytest.mark.slow
def test_the_common_test_file_is_a_test_set(tmp_path: Path) -> None:
    rows = [{"input": "30,100,93", "output": "23"}, {"input": "[3 5 7]", "output": "26"}]
    rows += [{"input": "1,2", "output": "3"}]
    file = tmp_path / "countdown_cd3_test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    easy: dict[str, Any] = {"largest": 9, "targets": [26, 26], "validation_examples": 5}
    made = build_task("countdown", test=str(file), train_examples=50, **easy)
    assert [e.columns for e in made.test] == [
        {"nums": [30, 100, 93], "target": 23},
        {"nums": [3, 5, 7], "target": 26},
    ]
    taken = set(keys(made.test))
    assert not taken & set(keys(made.train)) and not taken & set(keys(made.validation))
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"numbers": [i, 5, 7], "goal": 26}) + "\n" for i in range(1, 9))
    )
    names = {"nums": "numbers", "target": "goal"}
    test = tmp_path / "test.jsonl"
    test.write_text('{"nums": "30,100,93", "target": 23}\n{"nums": "7, 5, 3", "target": 26}\n')
    options: dict[str, Any] = {"train": str(tmp_path / "train.jsonl"), "validation_examples": 1}
    read = build_task("countdown", test=str(test), columns=names, **options)
    assert (len(read.train), len(read.validation), len(read.test)) == (6, 1, 2)
    with pytest.raises(ValueError, match=r"lacks the columns 'nums', 'target'; it has \['numbers'"):
        build_task("countdown", test=str(test), **options)
    test.write_text('{"nums": "30,many,1", "target": 23}\n{"nums": "7,5,3", "target": 26}\n')
    with pytest.raises(ValueError, match=r"row 0: .*'30,many,1', expected whole.* 1 of 2 rows"):
        build_task("countdown", test=str(test))
    skipping = build_task("countdown", test=str(test), skip_bad_rows=0.5, train_examples=9)
    assert len(skipping.test) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_style": "xml"}, "prompt_style must be"),
        ({"careless": 1.5}, "careless must lie in"),
        ({"numbers": 1}, "numbers must lie in"),
        ({"numbers": True}, "numbers must lie in"),
        ({"train_examples": 0}, "train_examples must be a whole number >= 1, got 0"),
        ({"validation_examples": -1}, "validation_examples must be .* >= 0"),
        ({"test_examples": 2.0}, "test_examples must be"),
        ({"largest": 0}, "largest must be"),
        ({"targets": [5, 1]}, "targets must be"),
        ({"targets": 7}, "targets must be"),
        ({"targets": []}, "targets must be"),
        ({"targets": [5000, 6000], "largest": 3}, r"found no problem .* target in \[5000, 6000\]"),
        ({"largest": 2, "numbers": 2}, "found only . of 256 test problems of 2 numbers up to 2"),
        ({"train": "a.jsonl", "careless": 0.5}, "careless is of made problems"),
        ({"train": "a.jsonl", "largest": 9}, "largest is of made problems"),
        ({"train": "a.jsonl", "targets": [1, 9]}, "targets is of made problems"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task("countdown", **options)
