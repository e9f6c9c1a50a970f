"""Configuration of LLaDA models, in the field names of the official ``config.json``."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from egspo.models.configuration import check_fixed, check_ranges

# Official switches of the architecture that exist in one state only here, with that state. A
# configuration that asks for another one describes a different function and is refused.
_FIXED: dict[str, tuple[object, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False,),
    "alibi": (False,),
    "rope": (True,),
    "rope_full_precision": (True,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "multi_query_attention": (False, None),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
}

_POSITIVE_INTEGERS = (
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "mlp_hidden_size",
    "vocab_size",
    "embedding_size",
    "max_sequence_length",
)
_DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout")


class LLaDAConfig(PretrainedConfig):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """A bidirectional Llama-like transformer; the defaults are LLaDA-8B.

    Official fields that have no influence on the function (``init_fn``, ``precision``,
    ``flash_attention``, ``auto_map`` and so on) are kept and written back.

    Args:
        d_model, n_layers, n_heads: width, number of blocks, query heads; the head dimension is
            ``d_model / n_heads``.
        n_kv_heads: key and value heads, a divisor of ``n_heads``; None for ``n_heads``.
        mlp_hidden_size: width of the gated MLP; None for ``mlp_ratio * d_model``.
        vocab_size: number of tokens.
        embedding_size: rows of the embedding and of the head, at least ``vocab_size``; None for
            ``vocab_size``.
        max_sequence_length: longest sequence accepted, in tokens.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square in every norm.
        weight_tying: the head is the embedding; the checkpoint then has no ``ff_out`` head.
        include_bias: biases in every linear layer, head included.
        include_qkv_bias: biases in the query, key and value projections.
        attention_dropout, residual_dropout, embedding_dropout: probabilities, in training mode.
        init_std: standard deviation of new weights.
        mask_token_id, bos_token_id, eos_token_id, pad_token_id: special tokens.

    Raises:
        ValueError: a field has a value outside its range, or asks for an architecture that is
            not implemented; the message names the field.
    """

    model_type: ClassVar[str] = "llada"
    prediction_shift: ClassVar[int] = 0
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "hidden_act": "activation_type",
        "initializer_range": "init_std",
        "tie_word_embeddings": "weight_tying",
    }

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = 12288
    mlp_ratio: int = 4
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    block_type: str = "llama"
    activation_type: str = "silu"
    layer_norm_type: str = "rms"
    rms_norm_eps: float = 1e-5
    rope: bool = True
    rope_full_precision: bool = True
    rope_theta: float = 500000.0
    weight_tying: bool = False
    include_bias: bool = False
    include_qkv_bias: bool = False
    bias_for_layer_norm: bool | None = False
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    init_std: float = 0.02
    mask_token_id: int | None = 126336
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call, unused-ignore]
        self._check_architecture()
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        self._check_ranges()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    def _check_architecture(self) -> None:
        check_fixed(self, _FIXED)
        if self.include_bias and self.bias_for_layer_norm is None:
            raise ValueError(
                "LLaDAConfig.bias_for_layer_norm must be False, got None, which means a bias in "
                "the norms where include_bias is True"
            )

    def _check_ranges(self) -> None:
        check_ranges(
            self,
            positive=_POSITIVE_INTEGERS,
            dropouts=_DROPOUTS,
            width="d_model",
            heads="n_heads",
            kv_heads="n_kv_heads",
        )
        assert self.embedding_size is not None
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"LLaDAConfig.embedding_size must be >= vocab_size={self.vocab_size}, "
                f"got {self.embedding_size}"
            )
