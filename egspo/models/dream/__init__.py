"""Dream, natively on transformers; importing it registers ``model_type: Dream``."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from egspo.models.dream.configuration import DreamConfig
from egspo.models.dream.modeling import DreamForMaskedLM, DreamModel
from egspo.models.dream.tokenization import DreamTokenizer

__all__ = ["DreamConfig", "DreamForMaskedLM", "DreamModel", "DreamTokenizer"]

AutoConfig.register(DreamConfig.model_type, DreamConfig, exist_ok=True)
AutoModel.register(DreamConfig, DreamModel, exist_ok=True)
AutoModelForMaskedLM.register(DreamConfig, DreamForMaskedLM, exist_ok=True)
AutoModelForCausalLM.register(DreamConfig, DreamForMaskedLM, exist_ok=True)
AutoTokenizer.register(  # type: ignore[no-untyped-call, unused-ignore]
    DreamConfig, tokenizer_class=DreamTokenizer, exist_ok=True
)
