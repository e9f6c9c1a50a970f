"""The objective of a run, by its name or by the import path of a user's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from egspo.algorithm.micro_batches import MicroBatches
from egspo.algorithm.objectives.base import Objective
from egspo.algorithm.objectives.coupled import CoupledObjective
from egspo.algorithm.objectives.mean_field import MeanFieldObjective
from egspo.algorithm.objectives.remasked import RemaskedObjective
from egspo.algorithm.objectives.sandwich import SandwichObjective
from egspo.algorithm.objectives.sequence_elbo import SequenceElboObjective
from egspo.algorithm.objectives.stepwise import StepwiseObjective
from egspo.algorithm.objectives.weighted import WeightedObjective
from egspo.config import TrainConfig
from egspo.engines.processes import Processes
from egspo.rollouts.denoiser import Denoiser

_BUILT_IN: dict[str, Callable[..., Objective]] = {
    "stepwise": StepwiseObjective,
    "mean_field": MeanFieldObjective,
    "weighted": WeightedObjective,
    "coupled": CoupledObjective,
    "sequence_elbo": SequenceElboObjective,
    "sandwich": SandwichObjective,
}
_METHODS = ("select", "score", "advantages", "counts", "loss", "nothing")


def build_objective(
    config: TrainConfig,
    denoiser: Denoiser,
    micro_batches: MicroBatches,
    processes: Processes,
    prompt_tokens: float,
) -> Objective:
    """What ``algorithm.objective`` names.

    Args:
        config: of the run.
        denoiser: of the policy.
        micro_batches: how many states share a pass.
        processes: this one among all of them.
        prompt_tokens: of a prompt, on average.

    Raises:
        ValueError: it cannot be imported or has not the methods of
            :class:`~egspo.algorithm.objectives.base.Objective`, or the model does not go with it.
    """
    made = check_objective(config, denoiser.block_size)
    return made(config, denoiser, micro_batches, processes, prompt_tokens)


def check_objective(config: TrainConfig, block_size: int | None) -> Callable[..., Objective]:
    """The class that ``algorithm.objective`` names, if it goes with a model.

    Args:
        config: of the run.
        block_size: of a block-causal model, or None.

    Raises:
        ValueError: as of :func:`build_objective`.
    """
    name = config.algorithm.objective
    made = _BUILT_IN[name] if name in _BUILT_IN else _imported(name)
    remasked = isinstance(made, type) and issubclass(made, RemaskedObjective)
    if block_size is not None and remasked:
        raise ValueError(
            f"algorithm.objective: {name} masks whole completions again, which a block-causal "
            "model cannot be shown: use stepwise"
        )
    return made


def _imported(path: str) -> Any:
    """The class at ``package.module:Class``."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"algorithm.objective: {path} cannot be imported: {error}") from error
    missing = [method for method in _METHODS if not callable(getattr(found, method, None))]
    if not inspect.isclass(found) or missing:
        raise ValueError(
            f"algorithm.objective: {path} must be a class with the methods of "
            f"egspo.algorithm.objectives.base.Objective; it lacks {', '.join(missing) or 'a class'}"
        )
    return found
