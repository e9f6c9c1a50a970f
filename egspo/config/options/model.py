"""What is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from egspo.config.options.checks import require


@dataclass
class LoraConfig:
    """Low-rank adapters on the projections of attention, MLPs and shared experts."""

    rank: int = 128
    """Columns of each factor."""
    alpha: int = 64
    """The product of the factors is scaled by ``alpha / rank``."""
    dropout: float = 0.05
    """Of the adapter's inputs, where training is supervised: RL runs without."""
    target_modules: list[str] | None = None
    """Module names or suffixes; None for all of these projections."""
    experts: bool = False
    """Also on the projections of every routed expert, by factors of its own: as many times the
    adapters' size as a layer has experts."""

    def __post_init__(self) -> None:
        require(self.rank > 0, f"model.lora.rank must be > 0, got {self.rank}")
        require(self.alpha > 0, f"model.lora.alpha must be > 0, got {self.alpha}")
        require(0 <= self.dropout < 1, f"model.lora.dropout must be in [0, 1), got {self.dropout}")


@dataclass
class ModelConfig:
    """Which model is trained: a checkpoint (``path``) or a new one (``config``)."""

    path: str | None = None
    """Local folder or hub name, for example ``GSAI-ML/LLaDA-8B-Instruct`` or
    ``Dream-org/Dream-v0-Instruct-7B``."""
    config: dict[str, Any] | None = None
    """Fields of a configuration for a new model, LLaDA's unless a ``model_type`` is among them
    (``Dream``, ``sdar``, ``sdar_moe``, ``llada2_moe``); the vocabulary comes from the tokenizer."""
    tokenizer: str | None = None
    """Folder or hub name; None takes ``path``'s, or the character tokenizer for a new model."""
    thinking: bool | None = None
    """Whether the chat template asks for thoughts before the answer, where it can (SDAR, LLaDA2);
    null leaves that to the template. Kept in the tokenizer that a run saves."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights in memory; ``auto`` is bfloat16 for a frozen base on a GPU, else float32."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4``: the frozen base under an adapter in 4 bits (QLoRA), by bitsandbytes. The head stays
    in ``dtype``."""
    attn_implementation: str = "sdpa"
    """As transformers names them, for example ``eager``, ``sdpa`` or ``flash_attention_2``; with a
    block-causal model on a GPU, ``flex_attention`` leaves out what a pass over copies masks."""
    block_size: int | None = None
    """Of a block-causal model, in place of its own; ``generation.block_length`` must equal it."""
    train_routers: bool = False
    """Without an adapter, also train which experts a token goes to, where the model has any."""
    gradient_checkpointing: bool = False
    """The backward pass computes each layer again, and only the layers' inputs are kept for it."""
    activation_offload: bool = False
    """What is kept for the backward pass is kept in host memory: all of it, or with
    ``gradient_checkpointing`` the layers' inputs."""
    lora: LoraConfig | None = None
    """A new adapter to train over the frozen base; null trains all weights."""
    adapter: str | None = None
    """Folder of an adapter in PEFT format to continue from."""

    def __post_init__(self) -> None:
        require(
            (self.path is None) != (self.config is None),
            "model needs exactly one of model.path (a checkpoint) and model.config (a new model)",
        )
        require(
            self.block_size is None or self.block_size > 0,
            f"model.block_size must be > 0, got {self.block_size}",
        )
        require(
            not (self.train_routers and self.has_adapter),
            "model.train_routers: true trains weights of the base, which an adapter freezes",
        )
        require(
            self.adapter is None or self.lora is None,
            "model.adapter continues an existing adapter: it excludes model.lora",
        )
        require(
            self.quantization == "none" or self.has_adapter,
            f"model.quantization: {self.quantization} freezes the weights: it needs model.lora or "
            "model.adapter",
        )

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, on a frozen base."""
        return self.lora is not None or self.adapter is not None
