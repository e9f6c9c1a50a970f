"""A byte-level ChatML tokenizer in the official files of Dream."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import pre_tokenizers

CHATML = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

BYTES = [*"abcĠ", *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set("abcĠ"))]
SPACE = 3
AB, EOS, IM_START, IM_END, _, MASK = range(256, 262)


def write_tokenizer(folder: Path) -> None:
    """The official files: vocab.json, merges.txt and the class that only remote code had."""
    folder.mkdir(exist_ok=True, parents=True)
    vocabulary = {token: i for i, token in enumerate([*BYTES, "ab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_prefix_space": False,
                "added_tokens_decoder": {
                    str(EOS + i): {"content": token, **plain, "special": True}
                    for i, token in enumerate(special)
                },
                "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "bos_token": "<|beginoftext|>",
                "chat_template": CHATML,
                "clean_up_tokenization_spaces": False,
                "eos_token": "<|endoftext|>",
                "errors": "replace",
                "mask_token": "<|mask|>",
                "model_max_length": 131072,
                "pad_token": "<|endoftext|>",
                "split_special_tokens": False,
                "tokenizer_class": "DreamTokenizer",
                "unk_token": None,
            }
        )
    )
