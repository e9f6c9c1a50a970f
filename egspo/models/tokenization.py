"""Chat prompts to tokens and back, and a character tokenizer for models made from scratch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from egspo.models.chat_template import render_chats

SUDOKU_CHARACTERS = "01234\n"

_SPECIAL = {
    "pad_token": "<|pad|>",
    "eos_token": "<|endoftext|>",
    "mask_token": "<|mask|>",
    "unk_token": "<|unk|>",
}
_ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def character_tokenizer(characters: str = SUDOKU_CHARACTERS) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per character, with mask, EOS and padding tokens and a template.

    Args:
        characters: the alphabet, each once; others become the unknown token.
    """
    if not characters or len(set(characters)) != len(characters):
        raise ValueError(f"characters must be distinct and not empty, got {characters!r}")
    entries = [*_SPECIAL.values(), *_ROLES, *characters]
    vocabulary = {token: index for index, token in enumerate(entries)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        additional_special_tokens=_ROLES,
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **_SPECIAL,
    )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[dict[str, str]]],
    prefills: Sequence[str] | None = None,
) -> list[list[int]]:
    """Tokens of chat prompts, ready to be answered.

    Args:
        tokenizer: with a chat template.
        prompts: chat messages.
        prefills: how the answer to each prompt begins; None for nothing.

    Text in a message that spells a special token becomes that token, as always with chat templates
    of transformers: strip it from prompts you do not trust. (A mask token in a prompt is not
    filled in; only the completion is.)

    Raises:
        TypeError: if a prompt is not a list of messages.
        ValueError: if the tokenizer has no chat template or it fails, a prompt is empty, or it has
            characters that the tokenizer does not know or that are none.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template to render prompts with"
        )
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not all(isinstance(message, dict) for message in prompt):
            raise TypeError(f"prompt {number} must be a list of chat messages, got {prompt!r}")
        if not prompt or not any(message.get("content") for message in prompt):
            raise ValueError(f"prompt {number} is empty")
    texts = render_chats(tokenizer, prompts, add_generation_prompt=True)
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {number} has half of a character: {error}") from error
    if prefills is not None:
        texts = [text + prefill for text, prefill in zip(texts, prefills, strict=True)]
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    _check_known(tokenizer, prompts, encoded)
    return encoded


def _check_known(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[dict[str, str]]],
    encoded: Sequence[Sequence[int]],
) -> None:
    """A model cannot answer what it cannot read: no unknown tokens."""
    unknown = tokenizer.unk_token_id
    # GPT-2's kind of tokenizer knows every byte and calls its end of text unknown.
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return
    for number, ids in enumerate(encoded):
        if unknown in ids:
            characters = sorted(set("".join(str(m.get("content")) for m in prompts[number])))
            lost = [
                c
                for c in characters
                if unknown in tokenizer(c, add_special_tokens=False)["input_ids"]
            ]
            raise ValueError(
                f"prompt {number} has characters that the tokenizer does not know: "
                f"{''.join(lost) or tokenizer.unk_token!r}"
            )


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[Sequence[int]], eos_id: int
) -> list[str]:
    """Texts of completions up to their first EOS or end of turn, special tokens left out."""
    ends = {eos_id, end_of_turn(tokenizer)}
    kept = [list(takewhile(lambda token: token not in ends, ids)) for ids in completions]
    if not kept:  # which some versions of transformers decode as one empty text
        return []
    texts: list[str] = tokenizer.batch_decode(
        kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts behind an answer, None if it puts none.

    It is ``<|im_end|>`` for Dream and ``<|eot_id|>`` for LLaDA, neither of which is the EOS that
    fills the rest of a completion.
    """
    if tokenizer.chat_template is None:
        return None
    answer = "\u241e"  # to be found again: in no template
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        (text,) = render_chats(tokenizer, [chat], add_generation_prompt=False)
    except ValueError:  # it takes prompts only, or nothing: encode_prompts says what
        return None
    behind: list[int] = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    if not behind:
        return None
    token = tokenizer.added_tokens_decoder.get(behind[0])
    return behind[0] if token is not None and token.special else None


# How chat templates say whether to think: SDAR's by a variable that may be given, LLaDA2's in a
# line of its own.
_VARIABLE = re.compile(r"\{%- set enable_thinking = (?:true|false) %\}")
_OPTION = re.compile(r"set thinking_option = '(?:on|off)'")


def set_thinking(tokenizer: PreTrainedTokenizerBase, on: bool | None) -> None:
    """Make the chat template ask for thoughts before the answer, or not; None changes nothing.

    Raises:
        ValueError: the template knows no difference.
    """
    if on is None:
        return
    template = tokenizer.chat_template
    if isinstance(template, str) and _OPTION.search(template):
        template = _OPTION.sub(f"set thinking_option = '{'on' if on else 'off'}'", template)
    elif isinstance(template, str) and "enable_thinking" in template:
        template = f"{{%- set enable_thinking = {str(on).lower()} %}}{_VARIABLE.sub('', template)}"
    else:
        raise ValueError(
            f"model.thinking is {str(on).lower()}, but the chat template of "
            f"{tokenizer.name_or_path!r} has no thinking to set: leave it out"
        )
    tokenizer.chat_template = template
