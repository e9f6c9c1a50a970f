"""Chat prompts to tokens and back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from egspo.models.chat_template import _TimeIsUpError, _TimeLimit
from egspo.models.tokenization import (
    SUDOKU_CHARACTERS,
    character_tokenizer,
    decode_completions,
    encode_prompts,
    end_of_turn,
)

TOKENIZER = character_tokenizer()
WIDE = "abc \n\r\t<|>_é中🙂▁Ġ'.,"  # with what byte and sentencepiece tokenizers treat apart


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(st.text(SUDOKU_CHARACTERS))
def test_round_trip(text: str) -> None:
    encoded = ids(TOKENIZER, text)
    assert len(encoded) == len(text)
    assert TOKENIZER.decode(encoded) == text
    assert decode_completions(TOKENIZER, [encoded], TOKENIZER.eos_token_id) == [text]


@given(st.text("abc \n\r\té中🙂▁Ġ'.,_"))
def test_round_trip_of_a_wide_alphabet(text: str) -> None:
    tokenizer = character_tokenizer(WIDE)
    encoded = ids(tokenizer, text)
    assert len(encoded) == len(text)
    assert decode_completions(tokenizer, [encoded], tokenizer.eos_token_id) == [text]


def test_special_tokens_are_distinct_and_no_characters() -> None:
    special = {
        name: getattr(TOKENIZER, f"{name}_token_id") for name in ("pad", "eos", "mask", "unk")
    }
    everything = [*special.values(), *ids(TOKENIZER, SUDOKU_CHARACTERS)]
    assert None not in everything
    assert len(set(everything)) == 4 + len(SUDOKU_CHARACTERS)
    assert set(special.values()) <= set(TOKENIZER.all_special_ids)
    assert max(everything) < len(TOKENIZER)
    assert TOKENIZER.bos_token_id is None


def test_encoding_adds_no_special_tokens() -> None:
    assert TOKENIZER("12")["input_ids"] == ids(TOKENIZER, "12")


@pytest.mark.parametrize("text", ["x", "5", " ", "\r", "é", "🙂", "１"])
def test_unknown_characters_become_the_unknown_token(text: str) -> None:
    assert ids(TOKENIZER, f"1{text}2") == [
        *ids(TOKENIZER, "1"),
        TOKENIZER.unk_token_id,
        *ids(TOKENIZER, "2"),
    ]


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(WIDE)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("pad", "eos", "mask", "unk", "bos"):
        assert getattr(loaded, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.all_special_ids == tokenizer.all_special_ids
    prompts = [chat("ab\n\nc"), chat("a", "b", "é中🙂 ")]
    assert encode_prompts(loaded, prompts) == encode_prompts(tokenizer, prompts)
    encoded = ids(loaded, WIDE)
    assert decode_completions(loaded, [encoded], loaded.eos_token_id) == [WIDE]


@pytest.mark.parametrize("characters", ["", "121"])
def test_bad_alphabets(characters: str) -> None:
    with pytest.raises(ValueError, match="characters must be distinct and not empty"):
        character_tokenizer(characters)


# --- encode_prompts


def test_prompts_are_rendered_by_the_template() -> None:
    (encoded,) = encode_prompts(TOKENIZER, [chat("12\n", "34", "0")])
    tokens = ["<|user|>", *"12\n", "<|assistant|>", *"34", "<|endoftext|>"]
    tokens += ["<|user|>", "0", "<|assistant|>"]
    assert TOKENIZER.convert_ids_to_tokens(encoded) == tokens


def test_prompts_are_independent_and_not_padded() -> None:
    prompts = [chat("1"), chat("1234\n1234"), chat("\n\n")]
    alone = [encode_prompts(TOKENIZER, [prompt])[0] for prompt in prompts]
    assert encode_prompts(TOKENIZER, prompts) == alone
    assert [len(prompt) for prompt in alone] == [3, 11, 4]
    assert encode_prompts(TOKENIZER, []) == []


def test_a_tokenizer_without_template_is_refused() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompts(tokenizer, [chat("1")])


@pytest.mark.parametrize("prompt", [[], [{"role": "user", "content": ""}], [{"role": "user"}]])
def test_empty_prompts_are_refused(prompt: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        encode_prompts(TOKENIZER, [chat("1"), prompt])


@pytest.mark.parametrize("prompt", ["1234", ["1234"]])
def test_prompts_that_are_no_messages_are_refused(prompt: object) -> None:
    with pytest.raises(TypeError, match=r"prompt 1 must be a list of chat messages, got .*1234"):
        encode_prompts(TOKENIZER, [chat("1"), prompt])  # type: ignore[list-item]


def test_prompts_the_tokenizer_cannot_read_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has characters .* does not know: '59'$"):
        encode_prompts(TOKENIZER, [chat("1"), chat("1529")])


def test_an_unknown_token_with_another_role_is_no_error() -> None:
    tokenizer = character_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's
    (encoded,) = encode_prompts(tokenizer, [chat("1", "2", "3")])
    assert tokenizer.eos_token_id in encoded


def test_special_tokens_spelled_in_a_message_become_special_tokens() -> None:
    """The documented behaviour, which is that of every chat template of transformers."""
    (encoded,) = encode_prompts(TOKENIZER, [chat("1<|mask|>2<|endoftext|>")])
    assert TOKENIZER.convert_ids_to_tokens(encoded) == [
        *("<|user|>", "1", "<|mask|>", "2", "<|endoftext|>", "<|assistant|>")
    ]


# --- decode_completions


def test_decoding_stops_at_the_first_eos() -> None:
    eos, mask, pad = TOKENIZER.eos_token_id, TOKENIZER.mask_token_id, TOKENIZER.pad_token_id
    one, two = ids(TOKENIZER, "12")
    completions = [
        [one, two],
        [one, eos, two, eos],
        [eos, one],
        [eos, eos],
        [],
        [one, mask, pad, two, TOKENIZER.unk_token_id],
    ]
    texts = decode_completions(TOKENIZER, completions, eos)
    assert texts == ["12", "1", "", "", "", "12"]
    assert decode_completions(TOKENIZER, [[one, two, two]], two) == ["1"]
    assert completions[1] == [one, eos, two, eos]
    assert decode_completions(TOKENIZER, [], eos) == []


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].content }}" + LOOPS, "takes longer than 1 s"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'x' * 3000 }}", "it says 3,000 characters, at most 2,000"),
        ("{{ 'x' * 10**15 }}", "MemoryError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_without_an_end_is_ended(
    template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the main thread or another."""
    monkeypatch.setattr("egspo.models.chat_template.SECONDS", 1.0)
    monkeypatch.setattr("egspo.models.chat_template.CHARACTERS", 2000)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    chat = [{"role": "user", "content": "1"}]

    def refused() -> None:
        with pytest.raises(ValueError, match=said) as error:
            encode_prompts(tokenizer, [chat])
        assert "does not take prompt 0: " in str(error.value)
        assert end_of_turn(tokenizer) is None

    refused()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(refused).result()


def test_time_that_is_up_ends_nothing_else() -> None:
    """Whenever it strikes: what follows is not interrupted."""
    ended = 0
    for number in range(300):
        try:
            with _TimeLimit(1e-4 * (number % 10)):
                sum(range(number * 10))
        except _TimeIsUpError:
            ended += 1
        sum(range(1000))
    assert ended < 300
    with pytest.raises(_TimeIsUpError), _TimeLimit(0.01):
        while True:
            pass
