"""LLaDA2, natively on transformers; importing it registers ``model_type: llada2_moe``."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from egspo.models.llada2.configuration import LLaDA2Config
from egspo.models.llada2.modeling import LLaDA2ForMaskedLM, LLaDA2Model

__all__ = ["LLaDA2Config", "LLaDA2ForMaskedLM", "LLaDA2Model"]

AutoConfig.register(LLaDA2Config.model_type, LLaDA2Config, exist_ok=True)
AutoModel.register(LLaDA2Config, LLaDA2Model, exist_ok=True)
AutoModelForMaskedLM.register(LLaDA2Config, LLaDA2ForMaskedLM, exist_ok=True)
AutoModelForCausalLM.register(LLaDA2Config, LLaDA2ForMaskedLM, exist_ok=True)
