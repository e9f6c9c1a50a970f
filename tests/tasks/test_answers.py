"""Where the answer is, and what its format pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from egspo.tasks.answers import (
    boxed,
    extract_answer,
    in_format,
    soft_format,
    strict_format,
    tagged_answer,
    xml_count,
)
from tests.tasks.hostile import HUGE, SMALL

GOOD = "<reasoning>\n3+4\nis 7\n</reasoning>\n<answer>\n7\n</answer>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "7"),
        ("<answer> 7 </answer>", "7"),
        ("<answer>1</answer> or <answer>2</answer>", "2"),
        ("<answer><answer>7</answer></answer>", "7"),
        # One that is cut off may have become another.
        ("<answer>7", None),
        ("<answer>7</answer> and <answer>8", "7"),
        # A later mention of the tag, an earlier one, the prompt's own words, the template.
        ("<answer>7</answer> is what I put into <answer>.", "7"),
        ("I close </answer> what <answer> opens: <answer>7</answer> </answer>", "7"),
        ("<answer>7</answer>, between <answer> and </answer>.", "7"),
        ("<answer>7</answer>, between `<answer>` and `</answer>`.", "7"),
        ("<answer>7</answer>, as in <answer>\n...\n</answer>", "7"),
        # The last that is not empty.
        ("<answer></answer>", None),
        ("<answer>7</answer><answer> \n </answer>", "7"),
        ("<answer>7</answer><answer>\\boxed{ }</answer>", "7"),
        ("<answer>\\boxed{} 7</answer>", "7"),
        ("7", None),
        ("</answer>7", None),
        ("", None),
    ],
)
def test_tagged_answers(text: str, answer: str | None) -> None:
    assert tagged_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{7}", "7"),
        ("\\boxed{1} then \\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
        ("\\boxed {\\{1,2\\}}.", "\\{1,2\\}"),
        ("$\\boxed 5$", "5"),
        ("\\fbox{7}", None),
        ("\\boxed{7", None),
        ("\\boxed", None),
        ("\\boxed{\\}", None),
        ("\\boxed{}", None),
        ("\\boxed{a}}", "a"),
        ("\\boxed{7} \\boxed{}", "7"),
        ("\\boxed{7} \\boxed{ \\, {} }", "7"),
        ("\\boxed{} \\boxed{7}", "7"),
        ("\\boxed{7} \\boxed{8", "7"),
        ("\\boxed{ { \\boxed{7}", "7"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{\\boxed{}}", None),
        ("{ \\boxed{7} }", "7"),
        ("\\boxed{x\\}y}", "x\\}y"),
        ("\\\\boxed{7}", "7"),
        ("\\boxed{7} \\boxed 8.", "8."),
    ],
)
def test_boxed_answers(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "7"),
        ("so \\boxed{7}", "7"),
        ("\\boxed{1} <answer>2</answer>", "2"),
        ("<answer>1</answer> \\boxed{2}", "1"),
        ("<answer>it is \\boxed{7}!</answer>", "7"),
        ("the answer is 7", None),
        ("<answer></answer> \\boxed{7}", "7"),
        ("<answer>\\boxed{}</answer> It is \\boxed{7}", "7"),
        ("<answer> \\boxed{7}", "7"),
        ("<answer>\\boxed{} 7 apples</answer>", "7 apples"),
    ],
)
def test_extraction(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "strict", "soft", "tags"),
    [
        (GOOD, 1, 1, 0.5),
        (GOOD + "\n", 1, 1, 0.5),
        (in_format("a", "b"), 1, 1, 0.5),
        (in_format("", ""), 1, 1, 0.5),
        (" " + GOOD, 0, 1, 0.5),
        (GOOD + "\n\n", 0, 1, 0.498),
        (GOOD + "\n" + "x" * 50, 0, 1, 0.4),
        (GOOD + "\n" + "x" * 5000, 0, 1, 0.25),
        (GOOD.replace("\n", " "), 0, 1, 0),
        (GOOD.replace("\n", ""), 0, 1, 0),
        ("So: " + GOOD, 0, 0, 0.5),
        (GOOD + "\n" + GOOD, 0, 1, 0),
        (GOOD.replace("</answer>", ""), 0, 0, 0.375),
        (GOOD.replace("<answer>", ""), 0, 0, 0.375),
        ("<answer>\n7\n</answer>\n<reasoning>\n3+4\n</reasoning>", 0, 0, 0.222),
        ("<reasoning>\n</reasoning>\n<answer>\n</answer>", 0, 1, 0.5),
        ("<reasoning>a</reasoning> b <answer>7</answer>", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_formats(text: str, strict: float, soft: float, tags: float) -> None:
    assert strict_format([text]) == [strict]
    assert soft_format([text]) == [soft]
    assert xml_count([text]) == pytest.approx([tags])


@pytest.mark.parametrize("function", [strict_format, soft_format, xml_count])
def test_formats_of_hostile_completions(function: Callable[..., Any]) -> None:
    paid = dict(zip(SMALL, function(completions=list(SMALL.values())), strict=True))
    for name, value in paid.items():
        assert 0 <= value <= 1
        # What has the format has earned its reward, whatever is in it.
        if name not in ("format echo", "chinese"):
            assert value == 0, name


@pytest.mark.parametrize("name", HUGE)
def test_everything_takes_linear_time(name: str) -> None:
    text = HUGE[name]
    start = time.process_time()
    extract_answer(text)
    boxed(text)
    for function in (strict_format, soft_format, xml_count):
        (value,) = function([text])
        assert 0 <= value <= 1
    assert time.process_time() - start < 2.0
