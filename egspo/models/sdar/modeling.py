"""SDAR: Qwen3's transformer, dense or with experts, denoised block by block.

Inside a block attention has no direction; between blocks it goes backwards only. The row of a
position predicts the token at it.
"""

from __future__ import annotations

from egspo.models.experts import (
    MixtureOfExperts,
    MixturePreTrainedModel,
    SoftmaxRouter,
    register_experts,
)
from egspo.models.qwen import HeadedForMaskedLM, LayeredTransformer, QwenAttention, QwenLayer
from egspo.models.sdar.configuration import SDARConfig, SDARMoeConfig
from egspo.models.transformer import GatedMLP, StrictPreTrainedModel


class SDARDecoderLayer(QwenLayer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Attention with norms on queries and keys, and a gated MLP."""

    def __init__(self, config: SDARConfig, layer: int) -> None:
        attention = QwenAttention(config, layer, bias=False, normed=True)
        super().__init__(config, attention, GatedMLP(config.hidden_size, config.intermediate_size))


class SDARMoeDecoderLayer(QwenLayer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """The same with experts in place of the MLP."""

    def __init__(self, config: SDARMoeConfig, layer: int) -> None:
        attention = QwenAttention(config, layer, bias=False, normed=True)
        experts = MixtureOfExperts(config, SoftmaxRouter(config), None, layer)
        super().__init__(config, attention, experts)


class SDARPreTrainedModel(StrictPreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """What both dense SDAR classes tell transformers."""

    config: SDARConfig
    config_class = SDARConfig
    _supports_flash_attn = False
    _no_split_modules = ["SDARDecoderLayer"]  # noqa: RUF012 - the type that transformers declares


class SDARModel(SDARPreTrainedModel, LayeredTransformer):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer without a head."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(
            config, [SDARDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )


class SDARForMaskedLM(SDARPreTrainedModel, HeadedForMaskedLM):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer and its head: logits at position ``i`` predict the token at ``i``."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config, SDARModel)


class SDARMoePreTrainedModel(MixturePreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """What both SDAR classes with experts tell transformers."""

    config: SDARMoeConfig
    config_class = SDARMoeConfig
    _supports_flash_attn = False
    _no_split_modules = ["SDARMoeDecoderLayer"]  # noqa: RUF012 - as transformers declares it


class SDARMoeModel(SDARMoePreTrainedModel, LayeredTransformer):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer with experts, without a head."""

    def __init__(self, config: SDARMoeConfig) -> None:
        super().__init__(
            config, [SDARMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )


class SDARMoeForMaskedLM(SDARMoePreTrainedModel, HeadedForMaskedLM):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer with experts and its head."""

    def __init__(self, config: SDARMoeConfig) -> None:
        super().__init__(config, SDARMoeModel)


register_experts(SDARMoeConfig.model_type)
