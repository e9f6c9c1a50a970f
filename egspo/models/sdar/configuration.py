"""Configurations of SDAR models, in the field names of the official ``config.json``."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from egspo.models.configuration import check_experts, check_fixed, check_ranges

# Official switches that exist in one state only here, with that state.
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
}
_FIXED_EXPERTS: dict[str, tuple[object, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}
_POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "block_size",
)


class SDARConfig(PretrainedConfig):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Qwen3's transformer with block-causal attention; the defaults are SDAR-8B.

    Official fields that have no influence on the function (``max_window_layers``, ``ep_size``,
    ``fuse_cross_entropy``, ``auto_map`` and so on) are kept and written back.

    Args:
        vocab_size: number of tokens, rows of the embedding and of the head.
        hidden_size, num_hidden_layers, num_attention_heads: width, layers, query heads.
        num_key_value_heads: key and value heads, a divisor of ``num_attention_heads``.
        head_dim: width of a head; need not be ``hidden_size / num_attention_heads``.
        intermediate_size: width of the gated MLP.
        block_size: positions that are denoised together and attend to one another.
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

    model_type: ClassVar[str] = "sdar"
    attribute_map: ClassVar[dict[str, str]] = {"max_sequence_length": "max_position_embeddings"}
    prediction_shift: ClassVar[int] = 0

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    block_size: int = 4
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mask_token_id: int | None = 151669
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("rope_scaling") is None:  # as published; transformers warns of the name
            kwargs.pop("rope_scaling", None)
        # What a checkpoint was trained with is no choice for whoever loads it.
        kwargs.pop("attn_implementation", None)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call, unused-ignore]
        check_fixed(self, _FIXED)
        check_ranges(
            self,
            positive=_POSITIVE_INTEGERS,
            dropouts=("attention_dropout",),
            width=None,
            heads="num_attention_heads",
            kv_heads="num_key_value_heads",
        )


class SDARMoeConfig(SDARConfig):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Qwen3-MoE's transformer with block-causal attention; the defaults are SDAR-30B-A3B.

    Args:
        num_experts, num_experts_per_tok: experts of a layer, and those that a token goes through.
        moe_intermediate_size: width of an expert.
        norm_topk_prob: whether the weights of the chosen experts add up to 1.

    The others are those of :class:`SDARConfig`; ``intermediate_size`` has no influence.
    """

    model_type: ClassVar[str] = "sdar_moe"

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 48
    num_key_value_heads: int = 4
    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_fixed(self, _FIXED_EXPERTS)
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"SDARMoeConfig.{name} must be an integer >= 1, got {value!r}")
        check_experts(self)
