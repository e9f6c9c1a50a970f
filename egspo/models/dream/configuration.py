"""Configuration of Dream models, in the field names of the official ``config.json``."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from egspo.models.configuration import check_fixed, check_ranges

# Official switches that exist in one state only here, with that state.
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
}
_POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


class DreamConfig(PretrainedConfig):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Qwen2.5's transformer without its causal mask; the defaults are Dream-7B.

    Official fields that have no influence on the function (``max_window_layers``,
    ``sliding_window`` where it is off, ``auto_map`` and so on) are kept and written back.

    Args:
        vocab_size: number of tokens, rows of the embedding and of the head.
        hidden_size, num_hidden_layers, num_attention_heads: width, layers, query heads; the head
            dimension is ``hidden_size / num_attention_heads``.
        num_key_value_heads: key and value heads, a divisor of ``num_attention_heads``; None for
            as many.
        intermediate_size: width of the gated MLP.
        max_position_embeddings: longest sequence accepted, in tokens.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square in every norm.
        tie_word_embeddings: the head is the embedding; the checkpoint then has no ``lm_head``.
        attention_dropout: probability, in training mode.
        initializer_range: standard deviation of new weights.
        mask_token_id, bos_token_id, eos_token_id, pad_token_id: special tokens. Completions are
            filled up with EOS, ``<|endoftext|>``; the turn ends with ``<|im_end|>`` before it.

    Raises:
        ValueError: a field has a value outside its range, or asks for an architecture that is
            not implemented; the message names the field.
    """

    model_type: ClassVar[str] = "Dream"
    attribute_map: ClassVar[dict[str, str]] = {"max_sequence_length": "max_position_embeddings"}
    prediction_shift: ClassVar[int] = 1  # the row of column i - 1 predicts the token at i

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mask_token_id: int | None = 151666
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("rope_scaling") is None:  # as published; transformers warns of the name
            kwargs.pop("rope_scaling", None)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call, unused-ignore]
        check_fixed(self, _FIXED)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        check_ranges(
            self,
            positive=_POSITIVE_INTEGERS,
            dropouts=("attention_dropout",),
            width="hidden_size",
            heads="num_attention_heads",
            kv_heads="num_key_value_heads",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads
