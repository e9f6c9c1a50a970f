"""Presets: several options at once, by name. A recipe's own keys win over them."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Entropy-selected steps, one advantage per trajectory.
    "egspo": {"algorithm": {"strategy": "high_entropy", "stepwise": False}},
    # The default: entropy-selected steps, stepwise advantages.
    "egspo-sa": {"algorithm": {"strategy": "high_entropy", "stepwise": True}},
    # Ablations: EGSPO on steps chosen without looking at the entropy.
    "uniform": {"algorithm": {"strategy": "uniform", "stepwise": False}},
    "random": {"algorithm": {"strategy": "random", "stepwise": False}},
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
