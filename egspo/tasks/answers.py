"""Finding the answer in a completion, and rewards for giving it in the format asked for.

The format is ``<reasoning>``, ``<answer>``; its rewards and their values are those of diffu-GRPO
(arXiv 2504.12216). Everything here takes time linear in the length of the completion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

FORMAT = """\
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""

_TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
# Linear only because `strict_format` looks at texts that have every tag once.
_STRICT = re.compile(
    r"<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n?", re.DOTALL | re.ASCII
)
_BETWEEN = re.compile(r"</reasoning>\s*<answer>")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_WORD = re.compile(r"[^\s$]+")


def in_format(reasoning: str, answer: str) -> str:
    """A completion as :data:`FORMAT` asks for it."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def tagged_answer(completion: str) -> str | None:
    """What the last ``<answer>`` encloses, or begins; None without one."""
    _, tag, rest = completion.rpartition("<answer>")
    return rest.partition("</answer>")[0].strip() if tag else None


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` encloses; None without one, or if its brace is not closed."""
    _, command, rest = text.rpartition("\\boxed")
    if not command:
        return None
    rest = rest.lstrip()
    if not rest.startswith("{"):  # \boxed 5
        word = _WORD.match(rest)
        return word[0] if word else None
    depth = 0
    for match in _BRACES.finditer(rest):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # \{ and \} are none
        if depth == 0:
            return rest[1 : match.start()].strip()
    return None


def extract_answer(completion: str) -> str | None:
    r"""The answer: in ``<answer>`` tags, in ``\boxed{}``, or in both.

    Of several, the last counts; text without tags and box has none.
    """
    tagged = tagged_answer(completion)
    inside = boxed(completion if tagged is None else tagged)
    return tagged if inside is None else inside


# --- reward functions


def strict_format(completions: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the completion is the format and nothing else, each tag on a line of its own."""
    return [
        float(all(text.count(tag) == 1 for tag in _TAGS) and _STRICT.fullmatch(text) is not None)
        for text in completions
    ]


def soft_format(completions: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the completion begins with reasoning and an answer follows it, all in tags."""
    return [float(_is_soft(text)) for text in completions]


def _is_soft(text: str) -> bool:
    between = _BETWEEN.search(text)
    return (
        text.lstrip().startswith("<reasoning>")
        and between is not None
        and text.find("</answer>", between.end()) >= 0
    )


def xml_count(completions: Sequence[str], **_: Any) -> list[float]:
    """0 to 0.5: 0.125 for each of the four tags that occurs once, with its line breaks.

    Each of the two answer tags loses 0.001 per character behind the end of the answer, so that
    going on after it does not pay.
    """
    return [_tags_paid(text) for text in completions]


def _tags_paid(text: str) -> float:
    reasoning = text.count("<reasoning>\n") == 1, text.count("\n</reasoning>\n") == 1
    answer = text.count("\n<answer>\n") == 1, text.count("\n</answer>") == 1
    _, closed, behind = text.rpartition("\n</answer>")
    extra = len(behind.removeprefix("\n")) if closed else 0
    return 0.125 * sum(reasoning) + sum(answer) * max(0.0, 0.125 - 0.001 * extra)
