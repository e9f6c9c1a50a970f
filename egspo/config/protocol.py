"""``protocol: published``: the settings of the paper's code, filled in where a recipe is silent.

Read from the authors' public code for arXiv 2603.12554 (its training script and configuration) in
November 2026; ``docs/protocol.md`` lists them with what they do differently. Prompts, rewards and
metrics of the protocol are the tasks': they get the option ``protocol: published``.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from egspo.config.options.run import TrainConfig
from egspo.config.presets import PRESETS

PUBLISHED_TASKS = ("countdown", "gsm8k", "math500", "sudoku")
"""Tasks with published prompts and rewards for training."""

_ABLATIONS = {"uniform": "uniform_reference", "random": "random_reference"}
# Which method it is stays the recipe's choice: EGSPO and EGSPO-SA were published in one protocol.
_METHOD = ("strategy", "stepwise")

PUBLISHED: dict[str, Any] = {
    "prompts_per_step": 6,
    **{
        f"{section}.{name}": value
        for section, values in PRESETS["reference"].items()
        for name, value in values.items()
        if name not in _METHOD
    },
    "algorithm.group_size": 8,
    "algorithm.selected_steps": 8,
    "algorithm.entropy_reduce": "mean",
    "algorithm.entropy_at": "one",
    "algorithm.lam": 0.5,
    "algorithm.lam_schedule": "constant",
    "algorithm.normalize_returns": True,
    "algorithm.returns": "joint",
    "algorithm.scale_by_std": False,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.5,
    "algorithm.beta": 0.04,
    "algorithm.kl": "k3",
    "algorithm.num_iterations": 1,
    "generation.max_new_tokens": 256,
    "generation.steps": 128,
    "generation.block_length": 32,
    "generation.temperature": 0.9,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 3e-5,
    "optimizer.betas": [0.9, 0.99],
    "optimizer.weight_decay": 0.1,
    "optimizer.max_grad_norm": 0.2,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "task.options.protocol": "published",
}
"""By dotted name."""

PUBLISHED_MODEL: dict[str, Any] = {
    "model.quantization": "nf4",
    "model.lora.rank": 128,
    "model.lora.alpha": 64,
    "model.lora.dropout": 0.05,
    # Theirs lists o_proj, gate_proj and down_proj too, which no module of LLaDA is called.
    "model.lora.target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
}
"""Of a checkpoint (``model.path``) that gets a new adapter."""


def fill_protocol(
    tree: dict[str, Any], overridden: set[str], *, forced: bool, problems: list[str]
) -> list[str]:
    """Add what ``protocol: published`` means and ``tree`` leaves out.

    Args:
        tree: recipe and overrides.
        overridden: paths of the overrides, which win; what is decided here is added.
        forced: whether the protocol is itself an override: it then wins over the recipe.
        problems: appended to.

    Returns:
        The paths that it decides.
    """
    if tree.get("protocol") != "published":
        return []
    task, model, algorithm = (_section(tree, name) for name in ("task", "model", "algorithm"))
    name = task.get("name", "sudoku")
    if name not in PUBLISHED_TASKS:
        problems.append(
            f"protocol: published has no prompts and rewards for task.name: {name}, only for "
            f"{', '.join(PUBLISHED_TASKS)}; algorithm.preset: reference has the settings alone"
        )
        return []
    values = dict(PUBLISHED)
    # `lora: null` says that there is to be none.
    new_adapter = model.get("adapter") is None and model.get("lora", {}) is not None
    if model.get("path") is not None and new_adapter:
        values |= PUBLISHED_MODEL
    preset = algorithm.get("preset")
    if preset in _ABLATIONS:
        values["algorithm.strategy"] = _ABLATIONS[preset]
    filled = [
        path
        for path, value in values.items()
        if _fill(tree, path, value, replace=forced and not _is_named(path, overridden))
    ]
    overridden.update(filled)
    return filled


def _fill(tree: dict[str, Any], path: str, value: Any, *, replace: bool) -> bool:
    """Set ``path`` where ``tree`` does not have it, or ``replace``; whether it is set now."""
    *sections, name = path.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            return False  # refused with the other values of a wrong type
    if name in tree and not replace:
        return False
    tree[name] = value
    return True


def _is_named(path: str, overridden: Container[str]) -> bool:
    """Whether an override is of ``path`` or of a section that it is in."""
    parts = path.split(".")
    return any(".".join(parts[:end]) in overridden for end in range(1, len(parts) + 1))


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, dict) else {}


def deviations(config: TrainConfig) -> list[str]:
    """Where ``config`` is not the published protocol, as ``name=value (published: value)``."""
    values = {"task.max_prompt_tokens": 200, **PUBLISHED}
    if config.model.path is not None:
        values |= PUBLISHED_MODEL
    return [
        f"{path}={found!r} (published: {value!r})"
        for path, value in values.items()
        for found in _look_up(config, path)
        if found != value
    ]


def _look_up(config: Any, path: str) -> Iterator[Any]:
    """The value at ``path``; None where there is no such section."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    yield list(config) if isinstance(config, tuple) else config
