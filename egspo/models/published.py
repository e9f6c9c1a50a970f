"""Configurations of published models, for what must be known of them without the hub."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig

from egspo.models.dream import DreamConfig
from egspo.models.llada import LLaDAConfig
from egspo.models.llada2 import LLaDA2Config
from egspo.models.sdar import SDARConfig, SDARMoeConfig


def _sdar(width: int, hidden: int, layers: int, heads: int) -> Callable[[], PretrainedConfig]:
    return lambda: SDARConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


# The defaults of the classes are published sizes.
_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "GSAI-ML/LLaDA-8B-Base": LLaDAConfig,
    "GSAI-ML/LLaDA-8B-Instruct": LLaDAConfig,
    "Dream-org/Dream-v0-Base-7B": DreamConfig,
    "Dream-org/Dream-v0-Instruct-7B": DreamConfig,
    "JetLM/SDAR-1.7B-Chat": _sdar(2048, 6144, 28, 16),
    "JetLM/SDAR-4B-Chat": _sdar(2560, 9728, 36, 32),
    "JetLM/SDAR-8B-Chat": SDARConfig,
    "JetLM/SDAR-30B-A3B-Chat": SDARMoeConfig,
    "inclusionAI/LLaDA2.0-mini": LLaDA2Config,
    "inclusionAI/LLaDA2.1-mini": LLaDA2Config,
}


def published_config(name: str) -> PretrainedConfig | None:
    """The configuration of the model ``name`` on the hub as it was published; None if not known."""
    known = _CONFIGS.get(name)
    return None if known is None else known()
