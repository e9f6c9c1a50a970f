"""What each objective reads of the options, and what it has no use for."""

from __future__ import annotations

import difflib

from egspo.config.options.algorithm import AlgorithmConfig
from egspo.config.options.checks import require
from egspo.config.options.generation import GenerationConfig

REMASKED = ("mean_field", "weighted", "coupled", "sequence_elbo", "sandwich")
"""Objectives that mask completions again, instead of going back to steps of the rollout."""
OBJECTIVES = ("stepwise", *REMASKED)
"""Those that are here; a user's own is ``package.module:Class``."""

_READ_BY = {
    "prompt_masking": ("mean_field", "weighted", "sandwich"),
    "mask_samples": ("sequence_elbo", "sandwich"),
    "weight_scale": ("weighted",),
    "bound_power": ("sandwich",),
    "bound_share": ("sandwich",),
}
_OF_STEPS = (
    *("strategy", "entropy_share", "stop_at_eos", "schedule", "detach_cache"),
    "replay_experts",
)
_WITHOUT_KL = ("weighted", "sandwich")


def check_objective(algorithm: AlgorithmConfig, generation: GenerationConfig) -> None:
    """Raises ValueError naming the option that ``algorithm.objective`` does not go with."""
    name = algorithm.objective
    if name not in OBJECTIVES:
        module, _, kind = name.partition(":")
        close = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        if name == "left_to_right":
            hint = ": it is stepwise on every step, algorithm.preset: just-grpo."
        require(
            all(part.isidentifier() for part in (*module.split("."), kind)),
            f"algorithm.objective: {name!r} is unknown{hint} There are "
            f"{', '.join(OBJECTIVES)}, and your own by package.module:Class",
        )
        return
    defaults = type(algorithm).__dataclass_fields__
    for option, objectives in _READ_BY.items():
        value = getattr(algorithm, option)
        require(
            name in objectives or value == defaults[option].default,
            f"algorithm.{option} ({value}) is of algorithm.objective: {' or '.join(objectives)}, "
            f"and {name} does not read it",
        )
    kl = "k2" if name == "sequence_elbo" else "k3"
    fitting = ("k3", "exact") if name == "stepwise" else (kl,)
    require(
        algorithm.beta == 0 or algorithm.kl in fitting,
        f"algorithm.objective: {name} has algorithm.kl: {' or '.join(fitting)}, got {algorithm.kl}",
    )
    if name == "stepwise":
        return
    require(
        not algorithm.stepwise,
        f"algorithm.objective: {name} gives a completion one advantage: it needs "
        "algorithm.stepwise: false",
    )
    for option in _OF_STEPS:
        value = getattr(algorithm, option)
        require(
            value == defaults[option].default,
            f"algorithm.{option} ({value}) is about denoising steps, which algorithm.objective: "
            f"{name} does not train",
        )
    require(
        name not in _WITHOUT_KL or algorithm.beta == 0,
        f"algorithm.objective: {name} has no KL to a reference policy: it needs algorithm.beta: 0, "
        f"got {algorithm.beta}",
    )
    for option, none in (("cache", "none"), ("guidance", 0.0)):
        value = getattr(generation, option)
        require(
            value == none,
            f"algorithm.objective: {name} scores canvases that no rollout was at: it needs "
            f"generation.{option}: {none}, got {value}",
        )
