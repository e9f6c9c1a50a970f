"""EGSPO: reinforcement learning for masked diffusion language models.

Entropy-guided step selection and stepwise advantages (arXiv 2603.12554). Data flows one way::

    prompts -> trajectories -> selected steps -> scored states -> loss -> update
    rollout    selection       scoring          advantages        iteration

``egspo train RECIPE`` runs all of it; the names below are what to build on from Python. They are
loaded when first used, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egspo.completion import Completion, TextDelta, TokenStep
    from egspo.config import TrainConfig
    from egspo.denoiser import Denoiser
    from egspo.generation import complete, generate, stream
    from egspo.recipe import load_config
    from egspo.rollout import rollout
    from egspo.trainer import train
    from egspo.trajectory import PromptBatch, Trajectory

_HOME = {
    "Completion": "completion",
    "Denoiser": "denoiser",
    "PromptBatch": "trajectory",
    "TextDelta": "completion",
    "TokenStep": "completion",
    "TrainConfig": "config",
    "Trajectory": "trajectory",
    "complete": "generation",
    "generate": "generation",
    "load_config": "recipe",
    "rollout": "rollout",
    "stream": "generation",
    "train": "trainer",
}

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "Denoiser",
    "PromptBatch",
    "TextDelta",
    "TokenStep",
    "TrainConfig",
    "Trajectory",
    "complete",
    "generate",
    "load_config",
    "rollout",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"egspo.{_HOME[name]}"), name)
    raise AttributeError(f"module 'egspo' has no attribute {name!r}")
