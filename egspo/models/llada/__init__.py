"""LLaDA, natively on transformers; importing it registers ``model_type: llada``."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from egspo.models.llada.configuration import LLaDAConfig
from egspo.models.llada.modeling import LLaDAForMaskedLM, LLaDAModel

__all__ = ["LLaDAConfig", "LLaDAForMaskedLM", "LLaDAModel"]

AutoConfig.register(LLaDAConfig.model_type, LLaDAConfig, exist_ok=True)
AutoModel.register(LLaDAConfig, LLaDAModel, exist_ok=True)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAForMaskedLM, exist_ok=True)
# The class under which the official checkpoints are published and asked for.
AutoModelForCausalLM.register(LLaDAConfig, LLaDAForMaskedLM, exist_ok=True)
