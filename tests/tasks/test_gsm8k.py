"""GSM8K in its own format: rewards, splits, and rows that are wrong."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from egspo.rewards.scoring import score_completions
from egspo.tasks import Task, build_task
from egspo.tasks.answers import in_format
from egspo.tasks.gsm8k import correctness, integer, solved
from egspo.tasks.numbers import last_number, number
from tests.tasks.hostile import HUGE, SMALL

ROWS = [
    {
        "question": f"Tom has {i} apples and buys 2 more. How many does he have?",
        "answer": f"He has {i} + 2 = <<{i}+2={i + 2}>>{i + 2} apples.\n#### {i + 2}",
    }
    for i in range(30)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the repository on the hub."""
    for name, rows in (("train", ROWS[:25]), ("test", ROWS[24:])):
        file = tmp_path / "gsm8k" / "main" / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    return tmp_path / "gsm8k" / "main"


def build(folder: Path, **options: Any) -> Task:
    options = {"validation_examples": 4, **options}
    return build_task("gsm8k", train=f"{folder}:train", test=f"{folder}:test", **options)


def test_examples(folder: Path) -> None:
    task = build(folder)
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 4, 6)
    questions = [{e.question for e in part} for part in (task.train, task.validation, task.test)]
    assert not questions[0] & questions[1] and not questions[1] & questions[2]
    assert not questions[0] & questions[2]  # one of the training file is in the test file too
    example = next(e for e in task.train if e.question == ROWS[3]["question"])
    assert example.columns == {"answer": "5"}
    assert example.target == in_format("He has 3 + 2 = 5 apples.", "5")
    (message,) = example.prompt
    assert message["role"] == "user"
    assert message["content"].startswith("Respond in the following format:\n<reasoning>\n...")
    assert message["content"].endswith(f"</answer>\n\n{ROWS[3]['question']}")
    assert build(folder, instruction="Answer.").train[0].prompt[0]["content"].startswith("Answer.")


def total(task: Task, completion: str, gold: str = "7") -> float:
    scored = score_completions(task.rewards, ["?"], [completion], {"answer": [gold]})
    return float(scored.total)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (in_format("3+4", "7"), 2.0 + 0.5 + 0.5 + 0.5 + 0.5),
        (in_format("3+4", "8"), 0.5 + 0.5 + 0.5 + 0.5),
        (in_format("3+4", "seven"), 0.5 + 0.5 + 0.5),
        (in_format("3+4", "7.0"), 2.0 + 0.5 + 0.5 + 0.5),
        ("<answer>7</answer>", 2.0 + 0.5),
        ("\\boxed{7}", 2.0 + 0.5),
        ("<answer>7</answer><answer>8</answer>", 0.5),
        ("<answer>8</answer><answer>7</answer>", 2.0 + 0.5),
        ("<answer>7 8</answer>", 0),
        ("7", 0),
        ("", 0),
    ],
)
def test_the_published_values(folder: Path, completion: str, reward: float) -> None:
    task = build(folder)
    assert total(task, completion) == pytest.approx(reward)
    assert task.solved is not None
    (is_solved,) = task.solved(prompts=["?"], completions=[completion], answer=["7"])
    assert is_solved == (reward > 2)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("<answer>7 apples</answer>", 1.0),
        ("<answer>$7.00 is left</answer>", 1.0),
        ("<answer>3 + 4 = 7</answer>", 1.0),
        ("<answer>7, not 8</answer>", 0.0),
        ("<answer>1,007</answer>", 0.0),
        ("<answer>-7</answer>", 0.0),
        ("<answer>seven</answer>", 0.0),
        ("7", 0.0),
    ],
)
def test_the_metric_is_more_lenient_than_the_reward(completion: str, right: float) -> None:
    assert solved(["?"], [completion], ["7"]) == [right]
    assert correctness(["?"], [completion], ["7"]) == [0.0]


@pytest.mark.parametrize(
    "text", ["1250", "1,250", "$1,250.00", " 1250. ", "1250%", "+1250", "\\$1250"]
)
def test_spellings_of_a_number(text: str) -> None:
    assert number(text) == 1250


@pytest.mark.parametrize(
    "text", ["-5", "\u22125", "-$5", "$-5", "\\$-5", "- 5", "\u2212 $5.00", "-5%", "$-5$", "-5."]
)
def test_every_minus_sign_is_one(text: str) -> None:
    assert number(text) == -5


@st.composite
def spelled(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A number, however it is written, and its value."""
    whole, digits = draw(st.integers(0, 10**9)), draw(st.sampled_from(["", ".", ".0", ".50"]))
    comma = draw(st.sampled_from(["", ",", "{,}", "\\,", "\u2009"]))
    text = f"{whole:,}".replace(",", comma) + digits
    sign = draw(st.sampled_from(["", "-", "+", "\u2212", "\u2013"]))
    currency = draw(st.sampled_from(["", "$", "\\$", "€"]))
    before = draw(st.sampled_from([sign + currency, currency + sign]))
    after = draw(st.sampled_from(["", "%", "\\%", " ", "."])) if not digits else ""
    wrapper = "{}" if "$" in currency else draw(st.sampled_from(["{}", "${}$", "\n{}\n"]))
    value = Fraction(f"{whole}.{digits.strip('.') or 0}")
    return wrapper.format(before + text + after), value * (1 if sign in ("", "+") else -1)


@given(spelled())
def test_every_spelling_of_a_number_is_read(pair: tuple[str, Fraction]) -> None:
    text, value = pair
    gold = str(float(value))
    assert number(text) == last_number(text) == value
    assert correctness(["?"], [f"<answer>{text}</answer>"], [gold]) == [1.0]
    assert correctness(["?"], [f"<answer>{text}</answer>"], [str(float(value) + 1)]) == [0.0]
    assert correctness(["?"], [f"<answer>{text} and 7</answer>"], [gold]) == [0.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72, altogether", 72),
        ("9{,}500 dollars", 9500),
        ("a loss of -$5", -5),
        ("a loss of \u22125 dollars", -5),
        ("10-7", 7),
        ("10 - 7", 7),
        ("x=-7", -7),
        ("1,250.50 in all", Fraction("1250.5")),
        ("12,50 €", None),
        ("none", None),
    ],
)
def test_the_last_number_in_a_text(text: str, value: Any) -> None:
    assert last_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "12,50",
            "1250 apples",
            "1e3",
            "١٢٥٠",
            "１２５０",
            "1250²",
            "",
            ".",
            "-",
            "inf",
            "nan",
            "1/2",
        ),
        *("0x1", "1_250", None, "9" * 5000),
    ],
)
def test_what_is_no_number(text: str | None) -> None:
    assert number(text) is None


@pytest.mark.slow
def test_hostile_completions_are_paid_nothing() -> None:
    for texts in (SMALL, HUGE):
        start = time.process_time()
        values = correctness(["?"] * len(texts), list(texts.values()), ["42"] * len(texts))
        assert values == [0.0] * len(texts)
        fooled = solved(["?"] * len(texts), list(texts.values()), ["42"] * len(texts))
        assert not any(fooled)
        paid = dict(zip(texts, integer(list(texts.values())), strict=True))
        assert [name for name, value in paid.items() if value] in (
            [],
            ["answers", "gaps", "lines", "after the answer"],
        )
        assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "answer": "42"},
            "the answer to 'q' must end in '#### NUMBER', got '42'",
        ),
        ({"question": "q", "answer": "#### many"}, "must end in '#### NUMBER'"),
        ({"problem": "q", "answer": "#### 1"}, r"lacks the column 'question'; it has \['problem'"),
        ({"question": "q", "answer": 1}, r"'answer' is 1 \(int\), expected a string"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({**row, "id": 1}) + "\n" + json.dumps({**row, "id": 2}) + "\n")
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"question": "another", "answer": "#### 1"}) + "\n")
    with pytest.raises(ValueError, match=message):
        build_task("gsm8k", train=str(file), test=str(test), validation_examples=0)
