"""EGSPO: reinforcement learning for masked diffusion language models.

Entropy-guided step selection and stepwise advantages (arXiv 2603.12554). Data flows one way::

    prompts -> trajectories -> selected steps -> scored states -> loss -> update
    tasks      rollouts        algorithm         algorithm        engines

``egspo train RECIPE`` runs all of it; the names below are what to build on from Python. They are
loaded when first used, so that importing the package stays cheap. docs/architecture.md walks
through the rooms.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egspo.config import TrainConfig
    from egspo.config.recipe import load_config
    from egspo.rollouts.completion import Completion, TextDelta, TokenStep
    from egspo.rollouts.denoiser import Denoiser
    from egspo.rollouts.engine import rollout
    from egspo.rollouts.trajectory import PromptBatch, Trajectory
    from egspo.serving.generation import complete, generate, stream
    from egspo.training.trainer import train

_HOME = {
    "Completion": "rollouts.completion",
    "Denoiser": "rollouts.denoiser",
    "PromptBatch": "rollouts.trajectory",
    "TextDelta": "rollouts.completion",
    "TokenStep": "rollouts.completion",
    "TrainConfig": "config",
    "Trajectory": "rollouts.trajectory",
    "complete": "serving.generation",
    "generate": "serving.generation",
    "load_config": "config.recipe",
    "rollout": "rollouts.engine",
    "stream": "serving.generation",
    "train": "training.trainer",
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
