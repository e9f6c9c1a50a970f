"""Configurations of published models, for what must be known of them without the hub."""

from __future__ import annotations

from transformers import PretrainedConfig

from egspo.models.dream import DreamConfig
from egspo.models.llada import LLaDAConfig

# The defaults of both classes are the published sizes.
_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "GSAI-ML/LLaDA-8B-Base": LLaDAConfig,
    "GSAI-ML/LLaDA-8B-Instruct": LLaDAConfig,
    "Dream-org/Dream-v0-Base-7B": DreamConfig,
    "Dream-org/Dream-v0-Instruct-7B": DreamConfig,
}


def published_config(name: str) -> PretrainedConfig | None:
    """The configuration of the model ``name`` on the hub as it was published; None if not known."""
    known = _CONFIGS.get(name)
    return None if known is None else known()
