"""Dream: Qwen2.5's transformer, bidirectional, that predicts the tokens under ``[MASK]``.

Dream grew out of an autoregressive model and kept its head one place to the left: the row of
column ``i - 1`` predicts the token at ``i``. Here the rows are moved by one before the head, so
that callers find what predicts a position at that position, as with any other model. The first row
has nobody to its left and stays: neither the first column, of a sequence or of a cached pass, nor
the first token behind padding on the left is for callers to predict.
"""

from __future__ import annotations

from egspo.models.dream.configuration import DreamConfig
from egspo.models.qwen import HeadedForMaskedLM, LayeredTransformer, QwenAttention, QwenLayer
from egspo.models.transformer import GatedMLP, StrictPreTrainedModel


class DreamDecoderLayer(QwenLayer):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Attention with biases on queries, keys and values, and a gated MLP."""

    def __init__(self, config: DreamConfig, layer: int) -> None:
        attention = QwenAttention(config, layer, bias=True, normed=False)
        super().__init__(config, attention, GatedMLP(config.hidden_size, config.intermediate_size))


class DreamPreTrainedModel(StrictPreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """What both Dream classes tell transformers."""

    config: DreamConfig
    config_class = DreamConfig
    _no_split_modules = ["DreamDecoderLayer"]  # noqa: RUF012 - the type that transformers declares


class DreamModel(DreamPreTrainedModel, LayeredTransformer):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer without a head; its rows are not moved."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(
            config, [DreamDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )


class DreamForMaskedLM(DreamPreTrainedModel, HeadedForMaskedLM):  # type: ignore[no-untyped-call, unused-ignore]
    """The transformer and its head: logits at position ``i`` predict the token at ``i``."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config, DreamModel)
