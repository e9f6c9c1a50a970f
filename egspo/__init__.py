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
    from egspo.config import TrainConfig
    from egspo.denoiser import Denoiser
    from egspo.generation import generate
    from egspo.recipe import load_config
    from egspo.rollout import rollout
    from egspo.trainer import train
    from egspo.trajectory import PromptBatch, Trajectory

_HOME = {
    "Denoiser": "denoiser",
    "PromptBatch": "trajectory",
    "TrainConfig": "config",
    "Trajectory": "trajectory",
    "generate": "generation",
    "load_config": "recipe",
    "rollout": "rollout",
    "train": "trainer",
}

__version__ = "0.1.0"
__all__ = [
    "Denoiser",
    "PromptBatch",
    "TrainConfig",
    "Trajectory",
    "generate",
    "load_config",
    "rollout",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"egspo.{_HOME[name]}"), name)
    raise AttributeError(f"module 'egspo' has no attribute {name!r}")
