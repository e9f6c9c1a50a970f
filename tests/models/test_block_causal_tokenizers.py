"""Tokenizers and chat templates of SDAR and LLaDA2, by their published files."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerBase

from egspo.models import SpecialTokens, load_config, load_tokenizer, special_token_ids
from egspo.models.tokenization import (
    character_tokenizer,
    decode_completions,
    encode_prompts,
    end_of_turn,
    set_thinking,
)
from tests import official

QUESTION = [{"role": "user", "content": "2+2?"}]
EOS, IM_END, MASK = 151643, 151645, 151669


@pytest.fixture
def sdar() -> PreTrainedTokenizerBase:
    return load_tokenizer(official.folder("SDAR-8B-Chat"))


@pytest.fixture
def llada2(sdar: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """LLaDA2's template and end of turn on another vocabulary: its own is not among the files."""
    file = official.folder("LLaDA2.0-mini") / "tokenizer_config.json"
    sdar.add_special_tokens({"additional_special_tokens": ["<|role_end|>"]})
    sdar.chat_template = json.loads(file.read_text("utf-8"))["chat_template"]
    return sdar


def asked(tokenizer: PreTrainedTokenizerBase) -> str:
    (ids,) = encode_prompts(tokenizer, [QUESTION])
    text: str = tokenizer.decode(ids)
    return text


def test_sdars_tokens(sdar: PreTrainedTokenizerBase) -> None:
    config = load_config(official.folder("SDAR-8B-Chat"))
    assert special_token_ids(sdar, config) == SpecialTokens(mask=MASK, eos=EOS, pad=EOS)
    assert sdar.mask_token_id == MASK and end_of_turn(sdar) == IM_END
    (ids,) = encode_prompts(sdar, [QUESTION])
    assert ids.count(IM_END) == 1 and MASK not in ids


def test_an_answer_of_sdar_ends_with_its_turn(sdar: PreTrainedTokenizerBase) -> None:
    texts = ["4<|im_end|>x<|endoftext|>", "4<|endoftext|>x", "a b"]
    ids = [sdar(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert decode_completions(sdar, ids, EOS) == ["4", "4", "a b"]


def test_thinking_of_sdar(sdar: PreTrainedTokenizerBase) -> None:
    turn = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert asked(sdar) == turn
    set_thinking(sdar, None)
    assert asked(sdar) == turn
    set_thinking(sdar, False)
    assert asked(sdar) == turn + "<think>\n\n</think>\n\n"
    assert end_of_turn(sdar) == IM_END
    set_thinking(sdar, True)
    assert asked(sdar) == turn


def test_thinking_of_llada2(llada2: PreTrainedTokenizerBase) -> None:
    system = "<role>SYSTEM</role>detailed thinking {}<|role_end|>"
    rest = "<role>HUMAN</role>2+2?<|role_end|><role>ASSISTANT</role>"
    assert asked(llada2) == system.format("off") + rest
    for on, word in ((True, "on"), (False, "off")):
        set_thinking(llada2, on)
        assert asked(llada2) == system.format(word) + rest
    assert end_of_turn(llada2) == llada2.convert_tokens_to_ids("<|role_end|>")


def test_templates_without_thinking_are_told() -> None:
    with pytest.raises(ValueError, match=r"model\.thinking is false, but the chat template"):
        set_thinking(character_tokenizer(), False)
