"""SDAR, natively on transformers; importing it registers ``sdar`` and ``sdar_moe``."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from egspo.models.sdar.configuration import SDARConfig, SDARMoeConfig
from egspo.models.sdar.modeling import (
    SDARForMaskedLM,
    SDARModel,
    SDARMoeForMaskedLM,
    SDARMoeModel,
)

__all__ = [
    "SDARConfig",
    "SDARForMaskedLM",
    "SDARModel",
    "SDARMoeConfig",
    "SDARMoeForMaskedLM",
    "SDARMoeModel",
]

for _config, _trunk, _model in (
    (SDARConfig, SDARModel, SDARForMaskedLM),
    (SDARMoeConfig, SDARMoeModel, SDARMoeForMaskedLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _trunk, exist_ok=True)
    AutoModelForMaskedLM.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
