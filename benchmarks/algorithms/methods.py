"""Who takes part. A method more is a line more in :data:`METHODS`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What a method changes in the recipe; ``{steps}`` stands for the denoising steps."""

    overrides: tuple[str, ...]
    by_k: bool = False
    """Whether it has a number of selected steps."""
    by_lam: bool = False
    """Whether it has EGSPO-SA's lambda."""
    tier: int = 0
    """Who is worth the first hours: 0 before 1 before 2."""


def _selection(strategy: str, tier: int = 0) -> Method:
    return Method((f"algorithm.strategy={strategy}",), by_k=True, by_lam=True, tier=tier)


def _preset(name: str) -> Method:
    """Another method with the settings of its paper's code, without a KL as all here, and
    without a block cache, under which no canvas that it scores could have been met."""
    changes = (f"algorithm.preset={name}", "algorithm.beta=0", "generation.cache=none")
    return Method(changes, tier=2)


METHODS = {
    "high_entropy": _selection("high_entropy"),
    "uniform": _selection("uniform"),
    "random": _selection("random"),
    "sign_aware": _selection("sign_aware", tier=1),
    "adaptive": Method(
        (
            *("algorithm.strategy=high_entropy", "algorithm.entropy_share=0.7"),
            "algorithm.selected_steps={steps}",
        ),
        by_lam=True,
        tier=1,
    ),
    "all": Method(("algorithm.strategy=all",), by_lam=True, tier=1),
    "value-head": Method(
        (
            *("algorithm.strategy=high_entropy", "algorithm.stepwise=true"),
            "algorithm.step_values=head",
        ),
        by_k=True,
        tier=2,
    ),
    "just-grpo": Method(
        (
            *("algorithm.preset=just-grpo", "algorithm.beta=0"),
            *("generation.policy=left_to_right", "generation.steps={steps}"),
        ),
        tier=2,
    ),
    "d1": _preset("d1"),
    "wd1": _preset("wd1"),
    "coupled-grpo": _preset("coupled-grpo"),
    "espo": _preset("espo"),
    "spg": _preset("spg"),
}
