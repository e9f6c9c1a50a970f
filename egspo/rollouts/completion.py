"""Completions as users see them: text, tokens, and when each token was revealed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from egspo.models.tokenization import decode_completions
from egspo.rollouts.trajectory import NEVER, Trajectory

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True)
class TokenStep:
    """A line of a step map: one revealed token."""

    position: int
    """In the completion, from 0."""
    token_id: int
    text: str
    """What the token adds to the text."""
    step: int
    """Denoising step that revealed it, from 0."""
    confidence: float
    """Probability of the token at temperature 1 when it was revealed."""
    entropy: float
    """Of the position when it was revealed, in nats."""


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt."""

    index: int
    """Place of the prompt."""
    text: str
    """Up to the first EOS, special tokens left out."""
    token_ids: list[int]
    """Up to the first EOS."""
    finish_reason: FinishReason
    """``eos``, or ``length`` where the model wrote none."""
    step_map: list[TokenStep] | None = None
    """Where asked for: every revealed token from left to right, EOS and what follows included."""


@dataclass(frozen=True)
class TextDelta:
    """Text that a block added to a completion."""

    index: int
    """Place of the prompt."""
    text: str
    """Never empty, and never half a character."""


def completions_of(
    trajectory: Trajectory,
    tokenizer: PreTrainedTokenizerBase,
    eos_id: int,
    *,
    indices: Sequence[int],
    step_map: bool = False,
) -> list[Completion]:
    """The B finished sequences of ``trajectory``, which are those of prompts ``indices``."""
    tokens, lengths = trajectory.tokens.tolist(), trajectory.lengths.tolist()
    texts = decode_completions(tokenizer, tokens, eos_id)
    return [
        Completion(
            index,
            texts[row],
            tokens[row][: lengths[row]],
            "eos" if lengths[row] < len(tokens[row]) else "length",
            step_map_of(trajectory, row, tokenizer) if step_map else None,
        )
        for row, index in enumerate(indices)
    ]


def step_map_of(
    trajectory: Trajectory, row: int, tokenizer: PreTrainedTokenizerBase
) -> list[TokenStep]:
    """The revealed tokens of sequence ``row``, from left to right."""
    revealed = (trajectory.unmask_step[row] != NEVER).nonzero()[:, 0]
    columns = [
        values[row][revealed].tolist()
        for values in (
            trajectory.tokens,
            trajectory.unmask_step,
            trajectory.confidence,
            trajectory.token_entropy,
        )
    ]
    pieces = token_pieces(tokenizer, columns[0])
    return [
        TokenStep(position, token, piece, step, confidence, entropy)
        for position, piece, token, step, confidence, entropy in zip(
            revealed.tolist(), pieces, *columns, strict=True
        )
    ]


class TextStream:
    """Text of a completion that grows from left to right."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_id: int, eos_id: int) -> None:
        self.tokenizer, self.mask_id, self.eos_id = tokenizer, mask_id, eos_id
        self.shown = ""

    def advance(self, tokens: list[int]) -> str:
        """What can be shown beyond what was: the text before the first mask or EOS.

        A character whose last bytes are still to come is held back. (Bytes that turn out to be no
        UTF-8 make some tokenizers take back characters before them; what was shown stays.)
        """
        known = tokens[: tokens.index(self.mask_id)] if self.mask_id in tokens else tokens
        (text,) = decode_completions(self.tokenizer, [known], self.eos_id)
        if len(known) < len(tokens) and self.eos_id not in known:
            text = _stable(text)
        delta = text[len(self.shown) :]
        self.shown += delta
        return delta


def _stable(text: str) -> str:
    """``text`` without the characters at its end that a further token may still complete.

    An incomplete UTF-8 sequence decodes as replacement characters.
    """
    return text.rstrip("\ufffd")


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What every token adds to the text, special tokens included.

    Joined, they are the text, unless that has bytes that are no UTF-8: a character of several
    tokens belongs to the last of them. (A token decoded alone would lose the space that
    sentencepiece puts before it.)
    """
    if not ids:  # which some versions of transformers decode as one empty text
        return []
    ends = range(1, len(ids) + 1)
    texts: list[str] = tokenizer.batch_decode(
        [list(ids[:end]) for end in ends], clean_up_tokenization_spaces=False
    )
    pieces, shown = [], 0
    for end, text in zip(ends, texts, strict=True):
        text = text if end == len(ids) else _stable(text)
        pieces.append(text[shown:])
        shown = max(shown, len(text))
    return pieces
