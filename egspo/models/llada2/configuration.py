"""Configuration of LLaDA2 models, in the field names of the official ``config.json``."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from egspo.models.configuration import check_experts, check_fixed, check_ranges

# Official switches that exist in one state only here, with that state.
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "use_qk_norm": (True,),
    "use_rmsnorm": (True,),
    "using_split_qkv_in_self_attention": (False,),
    "score_function": ("sigmoid",),
    "router_dtype": ("fp32",),
    "moe_router_enable_expert_bias": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "embedding_dropout": (0.0, 0),
    "output_dropout": (0.0, 0),
    "use_sliding_window": (False, None),
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
    "head_dim",
    "max_position_embeddings",
    "block_size",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
)


class LLaDA2Config(PretrainedConfig):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """A mixture of experts with block-causal attention; the defaults are LLaDA2.0-mini.

    Official fields that have no influence on the function (``max_window_layers``,
    ``sliding_window`` where it is off, ``auto_map`` and so on) are kept and written back.

    Args:
        vocab_size: number of tokens, rows of the embedding and of the head.
        hidden_size, num_hidden_layers, num_attention_heads: width, layers, query heads.
        num_key_value_heads: key and value heads, a divisor of ``num_attention_heads``.
        head_dim: width of a head.
        partial_rotary_factor: share of a head's dimensions that positions rotate, the first ones.
        intermediate_size: width of the gated MLP of the dense layers.
        first_k_dense_replace: so many layers are dense, the first ones.
        num_experts, num_experts_per_tok: experts of a layer, and those that a token goes through.
        num_shared_experts: as many experts more see every token, as one of that times the width.
        moe_intermediate_size: width of an expert.
        n_group, topk_group: the experts are chosen from the best groups.
        norm_topk_prob, routed_scaling_factor: whether the weights of the chosen experts add up to
            one, and what they are multiplied by.
        block_size: positions that are denoised together and attend to one another.
        max_position_embeddings: longest sequence accepted, in tokens.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square in every norm.
        tie_word_embeddings: the head is the embedding; the checkpoint then has no ``lm_head``.
        attention_dropout: probability, in training mode.
        initializer_range: standard deviation of new weights.
        mask_token_id, bos_token_id, eos_token_id, pad_token_id: special tokens. Completions are
            filled up with EOS, ``<|endoftext|>``; the turn ends with ``<|role_end|>`` before it.

    Raises:
        ValueError: a field has a value outside its range, or asks for an architecture that is
            not implemented; the message names the field.
    """

    model_type: ClassVar[str] = "llada2_moe"
    attribute_map: ClassVar[dict[str, str]] = {"max_sequence_length": "max_position_embeddings"}
    prediction_shift: ClassVar[int] = 0

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    partial_rotary_factor: float = 0.5
    rotary_dim: int | None = None
    first_k_dense_replace: int = 1
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 512
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    hidden_act: str = "silu"
    block_size: int = 32
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 600000.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mask_token_id: int | None = 156895
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 156892
    pad_token_id: int | None = 156892

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("rope_scaling") is None:  # as published; transformers warns of the name
            kwargs.pop("rope_scaling", None)
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
        check_experts(self, groups="n_group")
        rotated = self.head_dim * self.partial_rotary_factor
        if not 2 <= rotated <= self.head_dim or rotated % 2:
            raise ValueError(
                "LLaDA2Config.partial_rotary_factor must rotate an even number of the "
                f"{self.head_dim} dimensions of a head, got {self.partial_rotary_factor}"
            )
        if self.rotary_dim not in (None, int(rotated)):
            raise ValueError(
                f"LLaDA2Config.rotary_dim must be head_dim * partial_rotary_factor = "
                f"{int(rotated)}, got {self.rotary_dim}"
            )
        self.rotary_dim = int(rotated)
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(
                "LLaDA2Config.first_k_dense_replace must be in "
                f"[0, {self.num_hidden_layers}], got {self.first_k_dense_replace}"
            )
