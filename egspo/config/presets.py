"""Presets: several options at once, by name. A recipe's own keys win over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from egspo.config.options.generation import GenerationConfig


class SameAs(str):
    """Stands for the value of that other option of its section."""


def _remasked(objective: str, *, updates: int, clip: float | None = None) -> dict[str, Any]:
    """What methods on completions that are masked again have in common."""
    values = {
        "objective": objective,
        "stepwise": False,
        "scale_by_std": False,
        "ratio_temperature": "one",
        "num_iterations": updates,
    }
    return values if clip is None else {**values, "clip_low": clip, "clip_high": clip}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Entropy-selected steps, one advantage per trajectory.
    "egspo": {"algorithm": {"strategy": "high_entropy", "stepwise": False}},
    # The default: entropy-selected steps, stepwise advantages.
    "egspo-sa": {"algorithm": {"strategy": "high_entropy", "stepwise": True}},
    # Ablations: EGSPO on steps chosen without looking at the entropy.
    "uniform": {"algorithm": {"strategy": "uniform", "stepwise": False}},
    "random": {"algorithm": {"strategy": "random", "stepwise": False}},
    # Other methods, with the settings of their papers' code; group sizes and optimizers are the
    # recipe's.
    "d1": {
        "algorithm": {
            **_remasked("mean_field", clip=0.5, updates=12),
            "beta": 0.04,
            "prompt_masking": 0.15,
        }
    },
    "wd1": {
        "algorithm": {
            **_remasked("weighted", updates=8),
            "beta": 0.0,
            "weight_scale": 1.0,
            "prompt_masking": 0.15,
        }
    },
    "coupled-grpo": {"algorithm": {**_remasked("coupled", clip=0.5, updates=2), "beta": 0.01}},
    "espo": {
        "algorithm": {
            **_remasked("sequence_elbo", clip=0.2, updates=8),
            "beta": 0.01,
            "kl": "k2",
            "mask_samples": 2,
        }
    },
    "spg": {
        "algorithm": {
            **_remasked("sandwich", updates=4),
            "beta": 0.0,
            "mask_samples": 2,
            "bound_power": 1.5,
            "bound_share": 0.5,
            "prompt_masking": 0.15,
        }
    },
    # JustGRPO (arXiv 2601.15165): every token a step, from left to right, all of them trained.
    "just-grpo": {
        "algorithm": {
            "strategy": "all",
            "stepwise": False,
            "scale_by_std": True,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "beta": 0.0,
            "num_iterations": 1,
        },
        "generation": {"policy": "left_to_right", "steps": SameAs("max_new_tokens")},
    },
    # The authors' public code, including what `egspo-sa` does otherwise.
    "reference": {
        "algorithm": {
            "strategy": "high_entropy",
            "stepwise": True,
            "entropy_over": "revealed",
            "baseline": "rank",
            "aggregation": "sum",
            "ratio_temperature": "one",
            "schedule": "per_step",
            "ranks_per_update": 2,
            "first_rank": 1,
            "stop_at_eos": False,
        },
        "generation": {"policy": "low_confidence", "early_exit": False},
    },
}


def preset_values(name: str, tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of the preset ``name`` by section, for a recipe's ``tree``."""

    def value(section: str, wanted: Any) -> Any:
        if not isinstance(wanted, SameAs):
            return wanted
        given = tree.get(section)
        defaults = {"generation": GenerationConfig()}
        return (given if isinstance(given, Mapping) else {}).get(
            str(wanted), getattr(defaults[section], wanted)
        )

    return {
        section: {key: value(section, wanted) for key, wanted in values.items()}
        for section, values in PRESETS[name].items()
    }
