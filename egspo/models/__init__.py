"""Masked diffusion language models; importing it registers them with transformers."""

from __future__ import annotations

from egspo.models.dream import DreamConfig, DreamForMaskedLM, DreamModel
from egspo.models.llada import LLaDAConfig, LLaDAForMaskedLM, LLaDAModel
from egspo.models.llada2 import LLaDA2Config, LLaDA2ForMaskedLM, LLaDA2Model
from egspo.models.loading import (
    SpecialTokens,
    load_config,
    load_model,
    load_tokenizer,
    model_on_meta,
    new_config,
    new_model,
    special_token_ids,
)
from egspo.models.lora import LORA_TARGETS, add_lora, load_adapter, reference_mode
from egspo.models.sdar import (
    SDARConfig,
    SDARForMaskedLM,
    SDARModel,
    SDARMoeConfig,
    SDARMoeForMaskedLM,
    SDARMoeModel,
)

__all__ = [
    "LORA_TARGETS",
    "DreamConfig",
    "DreamForMaskedLM",
    "DreamModel",
    "LLaDA2Config",
    "LLaDA2ForMaskedLM",
    "LLaDA2Model",
    "LLaDAConfig",
    "LLaDAForMaskedLM",
    "LLaDAModel",
    "SDARConfig",
    "SDARForMaskedLM",
    "SDARModel",
    "SDARMoeConfig",
    "SDARMoeForMaskedLM",
    "SDARMoeModel",
    "SpecialTokens",
    "add_lora",
    "load_adapter",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_on_meta",
    "new_config",
    "new_model",
    "reference_mode",
    "special_token_ids",
]
