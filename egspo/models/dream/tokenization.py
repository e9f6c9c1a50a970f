"""Dream's tokenizer is Qwen2's, under the name that its official files ask for."""

from __future__ import annotations

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Byte-level BPE of ``vocab.json`` and ``merges.txt``; special tokens as the files say."""
