r"""Prompts, rewards and metrics as the paper's code has them, faults included.

For comparison with the numbers of arXiv 2603.12554, whose tasks are those of diffu-GRPO (arXiv
2504.12216). Written from the behaviour of the authors' public code (November 2026);
``docs/protocol.md`` has each beside what this project does otherwise, and what is not reproduced.

A task gets the published metric under either protocol, so that ``egspo eval`` shows both; prompts
and rewards are replaced only by :func:`under_protocol` with ``published``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from egspo.tasks import published_math, published_scores
from egspo.tasks.base import Example, Metric, Reward, Task

Protocol = Literal["strict", "published"]

PREFILL = "<reasoning>"
"""Of every prompt of the evaluation: the model goes on from there."""

_SYSTEM = (
    "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
)
_BOXED = (
    "Respond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n"
    "<answer>\n\\boxed{...}\n</answer>"
)
_MATH_EXPERT = (
    "You are a math expert. You will be given a question to solve. Solve it step by step. "
    "Wrap the final answer in a \\boxed{}."
)
_SUDOKU = (
    "\nPlease solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character "
    "string reading left-to-right, top-to-bottom, where '0' represents empty cells.\n\n"
    "Rules:\n- Fill empty cells with digits 1-4\n"
    "- Each row must contain digits 1-4 exactly once\n"
    "- Each column must contain digits 1-4 exactly once\n"
    "- Each 2x2 box must contain digits 1-4 exactly once\n\n"
    "Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, "
    "representing your final solved grid.\n\n"
    "Respond in this exact format:\n<reasoning>\nYour step-by-step solving process\n</reasoning>\n"
    "<answer>\n[16-character solution string with no spaces or separators]\n</answer>\n"
)
_COUNTDOWN = (
    "Using only the provided numbers, create an arithmetic expression that evaluates to exactly "
    "the provided target number. You may use the operations +, -, *, and / as needed, but each "
    "number must be used exactly once. Think step-by-step. After reasoning, provide only your "
    "final expression inside \\boxed{} tags without including an equals sign or the target "
    "number. For example: \\boxed{a + b * c}"
)


@dataclass(frozen=True)
class _Published:
    """What the paper's code has for a task."""

    train_prompt: Callable[[Example], str]
    test_prompt: Callable[[Example], str]
    rewards: Sequence[Reward]
    metric: Metric


def under_protocol(task: Task, protocol: Protocol, **chosen: object) -> Task:
    """``task`` with the published metric, and under ``published`` with its prompts and rewards.

    Args:
        task: one of :data:`TASKS`.
        protocol: ``strict`` leaves prompts and rewards as they are.
        chosen: options of the task that say what prompts or rewards are, None where left out.

    Raises:
        ValueError: an unknown protocol, or an option that ``published`` would ignore.
    """
    published = TASKS[task.name]
    if protocol == "strict":
        return replace(task, metrics=[published.metric])
    if protocol != "published":
        raise ValueError(f"protocol must be 'strict' or 'published', got {protocol!r}")
    for name, value in chosen.items():
        if value is not None:
            raise ValueError(
                f"protocol: published has its own prompts and rewards: leave out {name} "
                f"({value!r:.60})"
            )
    train, held_out = published.train_prompt, published.test_prompt
    return replace(
        task,
        train=[_prompted(example, train(example), "") for example in task.train],
        validation=[_prompted(example, held_out(example), PREFILL) for example in task.validation],
        test=[_prompted(example, held_out(example), PREFILL) for example in task.test],
        rewards=published.rewards,
        metrics=[published.metric],
        protocol="published",
    )


def _prompted(example: Example, content: str, prefill: str) -> Example:
    return replace(example, prompt=[{"role": "user", "content": content}], prefill=prefill)


def _sudoku_prompt(example: Example) -> str:
    return f"{_SUDOKU}\n\nSolve the following Sudoku puzzle: {example.columns['puzzle']}\n"


def _countdown_train(example: Example) -> str:
    nums, target = example.columns["nums"], example.columns["target"]
    return (
        f"{_SYSTEM}\nUsing only the numbers {nums}, create an arithmetic expression that evaluates "
        f"to exactly {target}. You must use all numbers from the list, and each number must be "
        "used exactly once. You may use the operations +, -, *, and / as needed. After reasoning, "
        "provide only your final expression inside <answer></answer> tags without including an "
        "equals sign or the target number. For example, if the numbers are [2, 3, 4] and the "
        "target is 5, a valid answer is: <answer>\n2*4-3\n</answer>"
    )


def _countdown_test(example: Example) -> str:
    nums, target = example.columns["nums"], example.columns["target"]
    return f"{_COUNTDOWN}{_BOXED}\n\nNumbers: {nums}\nTarget: {target}"


def _math_train(example: Example) -> str:
    return f"{_SYSTEM}\n\n{_MATH_EXPERT} \n\n{example.question}"


def _metric(function: Callable[..., list[float]], what: str, **more: Any) -> Metric:
    return Metric(
        "published", function, f"{what}, as the evaluation code of arXiv 2603.12554 counts", **more
    )


def _empty_cells(columns: dict[str, Any]) -> float:
    return float(columns["puzzle"].count("0"))


TASKS: dict[str, _Published] = {
    "gsm8k": _Published(
        lambda example: f"{_SYSTEM}\n\n{example.question}",
        lambda example: f"{_MATH_EXPERT} \n{_BOXED}\n\n{example.question}",
        [
            Reward("correctness", published_scores.gsm8k_correctness, weight=2.0),
            Reward("integer", published_scores.integer, weight=0.5),
            Reward("strict_format", published_scores.strict_format, weight=0.5),
            Reward("soft_format", published_scores.soft_format, weight=0.5),
            Reward("xml_count", published_scores.xml_count),
        ],
        _metric(published_scores.gsm8k_solved, "share of problems solved"),
    ),
    "math500": _Published(
        _math_train,
        # A quotation mark and a space behind the format are part of it.
        lambda example: f'{_MATH_EXPERT}\n{_BOXED}" \n\n\n{example.question}',
        [
            Reward("correctness", published_math.correctness, weight=2.0),
            Reward("boxed_format", published_math.boxed_format),
        ],
        _metric(published_math.solved, "share of problems solved"),
    ),
    "countdown": _Published(
        _countdown_train,
        _countdown_test,
        [Reward("expression", published_scores.countdown_reward)],
        _metric(published_scores.countdown_solved, "share of problems solved"),
    ),
    "sudoku": _Published(
        _sudoku_prompt,
        _sudoku_prompt,
        [Reward("cell_accuracy", published_scores.sudoku_reward)],
        _metric(
            published_scores.sudoku_cells,
            "share of the empty cells of all puzzles that are right (not of puzzles solved)",
            weight=_empty_cells,
        ),
    ),
}
"""By name of the task."""
