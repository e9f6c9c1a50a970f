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
_SPELLED = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
_BETWEEN = re.compile(r"</reasoning>\s*<answer>")
_ANSWER_TAG = re.compile(r"</?answer>")
_NO_ANSWER = re.compile(r"(?:and|or|to)?", re.IGNORECASE)  # "between <answer> and </answer>"
# Runs of escapes, and of empty braces, are one token: a megabyte of them takes no second.
_BOX_OR_BRACE = re.compile(r"\\{1,2}boxed\s*(\{)?|(?:\\(?!\\?boxed).)+|(?:\{\})+|[{}]", re.DOTALL)
_EMPTY_BOX = re.compile(r"\\{1,2}boxed\s*\{\s*\}")
_SPACING = set("\\ ,;:!\n\t{}")
_WORD = re.compile(r"[^\s$]+")


def in_format(reasoning: str, answer: str) -> str:
    """A completion as :data:`FORMAT` asks for it."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def tagged_answer(completion: str) -> str | None:
    r"""What the last pair of ``<answer>`` tags with an answer in it encloses, None without one.

    A tag that is not closed begins no answer: what is cut off may have been another. Neither white
    space, ``...``, an empty ``\boxed{}`` nor the prose "between <answer> and </answer>" is one.
    """
    found = None
    begin: int | None = None
    for tag in _ANSWER_TAG.finditer(completion):
        if tag[0] == "<answer>":
            begin = tag.end()
        elif begin is not None:
            inside = _EMPTY_BOX.sub("", completion[begin : tag.start()]).strip()
            if not _NO_ANSWER.fullmatch(inside.strip(" \n\t.…`'\"")):
                found = inside
            begin = None
    return found


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` that is closed and not empty encloses; None without one."""
    first = text.find("\\boxed")
    if first < 0:
        return None
    begin, found = -1, None
    # Of each open brace: where its box and the content begin, None for a brace of no box.
    places: list[tuple[int, int] | None] = []
    filled: list[bool] = []  # whether there is something in it
    end = first
    for token in _BOX_OR_BRACE.finditer(text, first):
        start, what = token.start(), token[0]
        if start < end:  # in a box without braces
            continue
        if start > end and filled and not filled[-1]:
            filled[-1] = not text[end:start].isspace()
        end = token.end()
        if what == "{" or token[1]:
            places.append((start, end) if token[1] else None)
            filled.append(False)
        elif what == "}":
            if places:
                place, full = places.pop(), filled.pop()
                if full and filled:
                    filled[-1] = True
                if place is not None and full and place[0] > begin:
                    begin, found = place[0], text[place[1] : start].strip()
        elif "boxed" in what:  # \boxed 5
            word = _WORD.match(text, end)
            if word and not word[0].startswith(("}", "\\boxed")):
                begin, found, end = start, word[0], word.end()
        elif filled and not filled[-1]:
            filled[-1] = "\\{" in what or "\\}" in what or not _SPACING.issuperset(what)
    return found


def extract_answer(completion: str) -> str | None:
    r"""The answer: in ``<answer>`` tags, in ``\boxed{}``, or in both.

    Of several, the last that is not empty counts; closed tags win over a box outside of them; text
    without tags and box has none.
    """
    tagged = tagged_answer(completion)
    inside = boxed(completion if tagged is None else tagged)
    return tagged if inside is None else inside


def answer_in_tags(completion: str) -> str | None:
    r"""As :func:`extract_answer`, but for a box outside of answer tags, which is none."""
    tagged = tagged_answer(completion)
    return None if tagged is None else boxed(tagged) or tagged


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
    once = [text.count(spelled) == 1 for spelled in _SPELLED]
    each = max(0.0, 0.125 - 0.001 * _behind_answer(text))
    return 0.125 * sum(once[:2]) + each * sum(once[2:])


def _behind_answer(text: str) -> int:
    """Characters behind the end of the answer and its line break."""
    _, closed, behind = text.rpartition("\n</answer>")
    return len(behind.removeprefix("\n")) if closed else 0


# --- why they pay what they do


def explain_strict_format(completion: str, **_: Any) -> str:
    """Why :func:`strict_format` pays what it does."""
    for tag in _TAGS:
        if completion.count(tag) != 1:
            return f"{tag} occurs {completion.count(tag)} times, not once"
    if strict_format([completion]) == [1.0]:
        return "is the format"
    return "there is other text, or a tag that is not on a line of its own"


def explain_soft_format(completion: str, **_: Any) -> str:
    """Why :func:`soft_format` pays what it does."""
    if not completion.lstrip().startswith("<reasoning>"):
        return "does not begin with <reasoning>"
    return "reasoning, then an answer" if _is_soft(completion) else "no answer behind reasoning"


def explain_xml_count(completion: str, **_: Any) -> str:
    """Why :func:`xml_count` pays what it does."""
    once = sum(completion.count(spelled) == 1 for spelled in _SPELLED)
    extra = _behind_answer(completion)
    return f"{once} of 4 tags once with their line breaks, {extra} characters behind the answer"
