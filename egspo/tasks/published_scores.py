r"""GSM8K, Countdown and Sudoku as the paper's code scores them.

Their evaluation reads text with its special tokens; here the text ends where the first end of text
was, and its end counts as one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from egspo.tasks.published_math import last_box

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

# --- formats: without DOTALL, "." stops at the end of a line

_STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
_SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")


def strict_format(completions: Sequence[str], **_: Any) -> list[float]:
    """1.0 for the format and nothing else, where reasoning and answer are one line each."""
    return [float(_STRICT.match(text) is not None) for text in completions]


def soft_format(completions: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the text begins with reasoning in tags and an answer follows, neither with a line
    break: whoever follows the format as it is asked for gets nothing."""
    return [float(_SOFT.match(text) is not None) for text in completions]


def xml_count(completions: Sequence[str], **_: Any) -> list[float]:
    """0.125 for each tag that occurs once with its line breaks, less 0.001 per character behind
    the answer and tag: of the whole text where the last line break is missing, so below 0 too."""
    return [_xml(text) for text in completions]


def _xml(text: str) -> float:
    count = 0.125 * (text.count("<reasoning>\n") == 1)
    count += 0.125 * (text.count("\n</reasoning>\n") == 1)
    if text.count("\n<answer>\n") == 1:
        count += 0.125 - 0.001 * len(text.split("\n</answer>\n")[-1])
    if text.count("\n</answer>") == 1:
        count += 0.125 - 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
    return count


# --- GSM8K

_GOLD = re.compile(r"\$?([\d,]+(?:\.\d+)?)")
_BOX = re.compile(r"\\boxed{(.*?)}")
_NUMBER = re.compile(r"-?\d+\.?\d*")


def _after_tag(text: str) -> str:
    """Between the last ``<answer>`` and what closes it; without tags the whole text."""
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def gsm8k_correctness(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the tagged answer is ``answer`` to the character: 18.0 and $18 are not 18."""
    pairs = zip(completions, answer, strict=True)
    return [float(_after_tag(text) == gold) for text, gold in pairs]


def integer(completions: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the tagged answer is nothing but digits (no sign)."""
    return [float(_after_tag(text).isdigit()) for text in completions]


def gsm8k_solved(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the number in the first box that has one, or else the last number of the first
    answer tags, is ``answer``. A comma ends a number, and a negative answer is never right."""
    scores = []
    for text, gold in zip(completions, answer, strict=True):
        wanted = _GOLD.match(gold)
        found = _gsm8k_number(text)
        scores.append(float(wanted is not None and found == float(wanted[1].replace(",", ""))))
    return scores


def _gsm8k_number(text: str) -> float | None:
    for box in _BOX.findall(text):
        content = box.strip()
        if content.strip("."):
            number = _number(content, first=True)
            if number is not None:
                return number
    tagged = _ANSWER.search(text)
    return None if tagged is None else _number(tagged[1].strip(), first=False)


def _number(text: str, *, first: bool) -> float | None:
    try:
        return float(text)
    except ValueError:
        numbers = _NUMBER.findall(text)
        return float(numbers[0 if first else -1]) if numbers else None


# --- Countdown

_ALLOWED = re.compile(r"^[\d+\-*/().\s]+$")
_EQUATION = re.compile(r"([0-9+\-*/() ]+)=[0-9. ]+")
_LATEX = {r"\div": "/", r"\times": "*", r"\cdot": "*"}
_MAX_LENGTH, _MAX_BITS = 1000, 4096


def countdown_reward(
    completions: Sequence[str], nums: Sequence[Sequence[int]], target: Sequence[int], **_: Any
) -> list[float]:
    """1.0 for the target, 0.1 for anything else in closed answer tags, 0.0 without."""
    scores = []
    for text, given, wanted in zip(completions, nums, target, strict=True):
        tagged = _ANSWER.findall(text)
        right = bool(tagged) and _reaches(tagged[-1].strip(), given, wanted)
        scores.append(1.0 if right else 0.1 if tagged else 0.0)
    return scores


def countdown_solved(
    completions: Sequence[str], nums: Sequence[Sequence[int]], target: Sequence[int], **_: Any
) -> list[float]:
    """1.0 where the last box reaches the target with the numbers.

    Without a box it is the first equation of the whole text; the first answer tags count only
    where a box is not closed.
    """
    samples = zip(completions, nums, target, strict=True)
    return [float(_reaches(_expression(text), given, wanted)) for text, given, wanted in samples]


def _expression(text: str) -> str:
    found = last_box(text)
    if found is None:
        tagged = _ANSWER.search(text)
        found = text if tagged is None else tagged[1].strip()
    for command, operator in _LATEX.items():
        found = found.replace(command, operator)
    equation = _EQUATION.search(found)
    return found if equation is None else equation[1].strip()


def _reaches(expression: str, nums: Sequence[int], target: int) -> bool:
    """Whether it has all the digits of ``nums``, and Python's arithmetic gives the target."""
    if len(expression) > _MAX_LENGTH:
        return False
    if sorted(int(number) for number in re.findall(r"\d+", expression)) != sorted(nums):
        return False
    if not _ALLOWED.match(expression):
        return False
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return abs(value - target) < 1e-5
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return False


def _value(node: ast.expr) -> float:
    """By Python's arithmetic, powers and floor division too, in bounded time.

    Raises:
        ValueError: something else, or a power that is too large.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if not isinstance(node, ast.BinOp):
        raise ValueError(f"no arithmetic: {ast.dump(node):.80}")
    left, right = _value(node.left), _value(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.FloorDiv():
            return left // right
        case ast.Pow() if abs(right) * max(int(abs(left)).bit_length(), 1) <= _MAX_BITS:
            power = left**right
            if not isinstance(power, complex):
                return float(power) if isinstance(power, float) else int(power)
    raise ValueError(f"no arithmetic: {ast.dump(node):.80}")


# --- Sudoku

_GRIDS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<answer>.*?```\s*([\d\s]+)```",
        r"<answer>(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|</answer>|\Z)",
        r"</answer>\s*(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|$)",
        r"(\d{16})\s*</answer>",
        r"\b(\d{16})\b",
    )
]


def sudoku_reward(
    completions: Sequence[str], puzzle: Sequence[str], solution: Sequence[str], **_: Any
) -> list[float]:
    """Share of the empty cells that the digits of the last closed answer tags fill rightly, by
    place; clues may be overwritten."""
    scores = []
    for text, *given in zip(completions, puzzle, solution, strict=True):
        tagged = _ANSWER.findall(text)
        digits = "".join(filter(str.isdigit, tagged[-1])) if tagged else ""
        scores.append(_cells(digits, *given))
    return scores


def sudoku_cells(
    completions: Sequence[str], puzzle: Sequence[str], solution: Sequence[str], **_: Any
) -> list[float]:
    """The same of the characters, digits or not, of the first of five patterns that is found."""
    samples = zip(completions, puzzle, solution, strict=True)
    return [_cells(_grid(text), *given) for text, *given in samples]


def _grid(text: str) -> str:
    for pattern in _GRIDS:
        found = pattern.search(text)
        if found is not None and found[1].strip():
            return re.sub(r"\s", "", found[1])
    return ""


def _cells(answer: str, puzzle: str, solution: str) -> float:
    empty = [place for place, digit in enumerate(puzzle) if digit == "0"]
    right = sum(answer[place : place + 1] == solution[place] for place in empty)
    return right / len(empty)
