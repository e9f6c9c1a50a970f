"""The published prompts, rewards and metrics, faults included.

Expected values were read off the authors' public code; the same texts give other values under the
strict protocol where that is what the test is about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from egspo.config.protocol import PUBLISHED_TASKS
from egspo.tasks import Task, build_task, published_math, published_scores
from egspo.tasks.answers import soft_format, strict_format
from egspo.tasks.published import PREFILL, TASKS

Score = Callable[..., list[float]]

ONE_LINE = "<reasoning>\nso\n</reasoning>\n<answer>\n18\n</answer>\n"
TWO_LINES = "<reasoning>\nso\nso\n</reasoning>\n<answer>\n18\n</answer>\n"
FLAT = "<reasoning>so</reasoning><answer>18</answer>"


def test_the_configuration_and_the_tasks_name_the_same_tasks() -> None:
    assert sorted(TASKS) == sorted(PUBLISHED_TASKS)


@pytest.mark.parametrize(
    ("text", "strict", "soft"), [(ONE_LINE, 1, 0), (TWO_LINES, 0, 0), (FLAT, 0, 1)]
)
def test_formats_know_no_line_breaks(text: str, strict: float, soft: float) -> None:
    assert published_scores.strict_format([text]) == [strict]
    assert published_scores.soft_format([text]) == [soft]
    # Strictly, whoever does as the prompt says is paid for it.
    assert (strict_format([text]), soft_format([text])) == ([float(text != FLAT)], [1.0])


def test_xml_count_charges_for_the_whole_text_without_the_last_line_break() -> None:
    whole = f"{'x' * 400}\n<answer>\n18\n</answer>"
    (paid,) = published_scores.xml_count([whole])
    # Both answer tags; 0.001 per character of everything, and for -1 characters behind the end.
    assert paid == pytest.approx(0.125 - 0.001 * len(whole) + 0.125 + 0.001)
    assert paid < 0
    assert published_scores.xml_count([ONE_LINE]) == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("text", "gold", "reward", "solved"),
    [
        ("<answer>\n18\n</answer>", "18", 1, 1),
        ("<answer>18.0</answer>", "18", 0, 1),
        ("<answer>$18</answer>", "18", 0, 1),
        ("18", "18", 1, 0),  # without tags all of the text is the answer of the reward
        ("<answer>1,250</answer>", "1,250", 1, 0),  # a comma ends the number of the metric
        ("<answer>-5</answer>", "-5", 1, 0),  # no negative answer is right
        (r"\boxed{18} or \boxed{19}", "18", 0, 1),  # the first box
        (r"\boxed{...} \boxed{about 18 of 20}", "18", 0, 1),  # the first number in a box
        ("<answer>18 of 20</answer>", "20", 0, 1),  # but the last one in tags
    ],
)
def test_gsm8k(text: str, gold: str, reward: float, solved: float) -> None:
    assert published_scores.gsm8k_correctness([text], [gold]) == [reward]
    assert published_scores.gsm8k_solved([text], [gold]) == [solved]


@pytest.mark.parametrize(
    ("text", "gold", "reward", "solved"),
    [
        (r"so \boxed{\frac12}", r"\frac{1}{2}", 1, 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1, 1),
        (r"\boxed{1/2}", r"\frac{1}{2}", 1, 1),
        (r"\boxed{x = 5}", "5", 1, 1),
        (r"\boxed{5 \text{ cm}}", "5", 1, 1),
        (r"\boxed{x/2}", r"x / 2", 0, 0),  # no rule for it: compared as it stands
        (r"\boxed{2+3}", "5", 0, 0),
        (r"\boxed{2,3}", "2, 3", 1, 1),
        ("<answer>5</answer>", "5", 0, 0),  # without a box all of the text is the answer
        ("5", "5", 1, 1),
        (r"\boxed{5 <answer>5</answer>", "5", 0, 1),  # tags count where the box is not closed
        (r"\boxed 5$ it is", "5", 1, 1),
        (r"\fbox{5}", "5", 0, 0),
    ],
)
def test_math(text: str, gold: str, reward: float, solved: float) -> None:
    assert published_math.correctness([text], [gold]) == [reward]
    assert published_math.solved([text], [gold]) == [solved]


@pytest.mark.parametrize(
    ("text", "paid"), [(r"<answer>\boxed{5}</answer>", 0.75), ("<answer>", 0.75), (r"\boxed", 0.25)]
)
def test_the_format_of_math_never_sees_a_box(text: str, paid: float) -> None:
    assert published_math.boxed_format([text]) == [paid]


@pytest.mark.parametrize(
    ("text", "reward", "solved"),
    [
        ("<answer>3*7+5</answer>", 1, 0),  # without a box the whole text is looked at
        (r"<answer>\boxed{3*7+5}</answer>", 0.1, 1),
        (r"\boxed{3 \times 7 + 5}", 0, 1),
        ("it is 3*7+5 = 26, so <answer>no</answer>", 0.1, 1),  # the first equation anywhere
        ("<answer>nothing</answer>", 0.1, 0),  # tags alone pay
        ("<answer>3*7+5=26</answer>", 0.1, 1),
        ("<answer>3*7*5</answer>", 0.1, 0),
        ("<answer>3*7+5", 0, 0),
        ("<answer>(3)(7)(5)</answer>", 0.1, 0),
        ("<answer>7**35</answer>", 0.1, 0),
    ],
)
def test_countdown(text: str, reward: float, solved: float) -> None:
    given = {"nums": [[3, 5, 7]], "target": [26]}
    assert published_scores.countdown_reward([text], **given) == [reward]
    assert published_scores.countdown_solved([text], **given) == [solved]


@pytest.mark.parametrize("text", ["9**9**9", "-" * 900 + "9", "(" * 900 + "9", "9" * 900])
def test_expressions_end_in_bounded_time(text: str) -> None:
    nums = [int(part) for part in text.replace("*", " ").replace("-", " ").strip("(").split()]
    tagged = f"<answer>{text}</answer>"
    (paid,) = published_scores.countdown_reward([tagged], nums=[nums], target=[1])
    assert paid == 0.1


PUZZLE, SOLUTION = "1320021000240001", "1324421331242431"


@pytest.mark.parametrize(
    ("text", "reward", "metric"),
    [
        (f"<answer>\n{SOLUTION}\n</answer>", 1, 1),
        (f"<answer>{SOLUTION[:8]}</answer>", 3 / 8, 3 / 8),
        ("<answer>1324 4213 3124 2431</answer>", 1, 1),
        ("<answer>1324|4213|3124|2431</answer>", 1, 4 / 8),  # the metric drops white space alone
        (f"<answer>4444{SOLUTION[4:]}</answer>", 1, 1),  # a clue may be overwritten
        (f"<answer>{SOLUTION}", 0, 1),
        (f"it is {SOLUTION}.", 0, 1),
        (f"<answer>no</answer> {SOLUTION}", 0, 0),
        ("4x4", 0, 0),
    ],
)
def test_sudoku(text: str, reward: float, metric: float) -> None:
    given = {"puzzle": [PUZZLE], "solution": [SOLUTION]}
    assert published_scores.sudoku_reward([text], **given) == pytest.approx([reward])
    assert published_scores.sudoku_cells([text], **given) == pytest.approx([metric])


# --- prompts


def rows(folder: Path, name: str, lines: Sequence[dict[str, str]]) -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def content(task: Task, split: str) -> str:
    (message,) = getattr(task, split)[0].prompt
    assert message["role"] == "user"
    return message["content"]


def test_training_and_evaluation_have_their_own_prompts_and_only_evaluation_a_prefill() -> None:
    sizes = {"train_examples": 4, "test_examples": 2}
    task = build_task("countdown", validation_examples=2, protocol="published", **sizes)
    assert "2*4-3\n</answer>" in content(task, "train") and "boxed" not in content(task, "train")
    assert "\\boxed{a + b * c}Respond in the following" in content(task, "test")
    assert content(task, "validation").startswith("Using only the provided numbers")
    assert {example.prefill for example in task.train} == {""}
    assert {example.prefill for example in (*task.test, *task.validation)} == {PREFILL}
    strict = build_task("countdown", validation_examples=2, **sizes)
    assert [e.columns for e in strict.test] == [e.columns for e in task.test]
    assert {example.prefill for example in strict.test} == {""}


def test_prompts_of_word_problems(tmp_path: Path) -> None:
    gsm8k = rows(tmp_path, "g", [{"question": f"Q{i}", "answer": f"#### {i}"} for i in range(5)])
    sizes = {"test": None, "test_examples": 2, "validation_examples": 1, "protocol": "published"}
    task = build_task("gsm8k", train=gsm8k, **sizes)
    begin = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n"
    assert content(task, "train").startswith(f"{begin}<answer>\n...\n</answer>\n\n\nQ")
    assert "Wrap the final answer in a \\boxed{}. \nRespond" in content(task, "test")
    problems = [{"problem": f"Q{i}", "solution": f"\\boxed{{{i}}}"} for i in range(5)]
    task = build_task("math500", train=rows(tmp_path, "m", problems), **sizes)
    assert content(task, "train").startswith(begin)
    assert '</answer>" \n\n\nQ' in content(task, "test")


def test_what_the_protocol_would_ignore_is_refused() -> None:
    few = {"train_examples": 1, "test_examples": 1}
    for options in (
        {"instruction": "Solve {puzzle}."},
        {"prompt_style": "digits"},
        {"reward": "empty_cells"},
    ):
        with pytest.raises(ValueError, match=f"leave out {next(iter(options))}"):
            build_task("sudoku", protocol="published", **few, **options)
    with pytest.raises(ValueError, match="protocol must be 'strict' or 'published', got 'best'"):
        build_task("sudoku", protocol="best", **few)


def test_own_instructions() -> None:
    task = build_task("sudoku", instruction="Cells {puzzle} in rows:\n{rows}", train_examples=1)
    puzzle = task.train[0].columns["puzzle"]
    rows_of = "\n".join(puzzle[i : i + 4] for i in range(0, 16, 4))
    assert content(task, "train") == f"Cells {puzzle} in rows:\n{rows_of}"
    task = build_task("countdown", instruction="{target} of {nums} {really}", train_examples=1)
    columns = task.train[0].columns
    assert content(task, "train") == f"{columns['target']} of {columns['nums']} {{really}}"
    with pytest.raises(ValueError, match=r"must have \{rows\} or \{puzzle\}, where the problem"):
        build_task("sudoku", instruction="Solve this.")
    with pytest.raises(ValueError, match=r"must have \{nums\} and \{target\}"):
        build_task("countdown", instruction="Reach {target}.")
    with pytest.raises(ValueError, match="no effect with prompt_style: digits"):
        build_task("sudoku", prompt_style="digits", instruction="{puzzle}")
