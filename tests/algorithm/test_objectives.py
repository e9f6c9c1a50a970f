"""Which objective a run has: by name, by import path, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from egspo.algorithm.objectives.stepwise import StepwiseObjective
from egspo.config import PRESETS
from egspo.config.recipe import ConfigError, load_config
from egspo.engines.reduction import merge
from egspo.planning.expected_work import Shares
from egspo.planning.plan import Planner
from egspo.training.trainer import Trainer
from tests.helpers.runs import config


class Halved(StepwiseObjective):
    """A user's own: half the weight of EGSPO's."""

    @property
    def share(self) -> float:
        return super().share / 2


def test_a_users_own_objective_is_trained(tmp_path: Path) -> None:
    def loss(objective: str) -> Any:
        changes = {"algorithm": {"objective": objective, "stepwise": False}}
        trainer = Trainer(config(tmp_path / objective.replace(":", "-"), changes))
        return merge([trainer.iteration.run(1, [0, 1, 2], 0)])["grad_norm"]

    whole, half = loss("stepwise"), loss(f"{__name__}:Halved")
    assert whole > 0 and half == pytest.approx(whole / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.nowhere:Objective", "cannot be imported"),
        (f"{__name__}:Missing", "cannot be imported"),
        ("pathlib:Path", "lacks select, score"),
    ],
)
def test_what_is_no_objective_is_refused(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(config(tmp_path, {"algorithm": {"objective": path}}))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"objective": "mean_feild"}, "did you mean 'mean_field'"),
        ({"objective": "left_to_right"}, "preset: just-grpo"),
        ({"objective": "nothing at all"}, r"package\.module:Class"),
        ({"objective": "coupled"}, r"needs algorithm\.stepwise: false"),
        ({"objective": "weighted", "stepwise": False, "beta": 0.1}, "no KL"),
        ({"objective": "sandwich", "stepwise": False, "beta": 0.1}, "no KL"),
        ({"objective": "sequence_elbo", "stepwise": False, "beta": 0.1}, r"algorithm\.kl: k2"),
        ({"objective": "coupled", "stepwise": False, "beta": 0.1, "kl": "exact"}, "k3, got exact"),
        ({"beta": 0.1, "kl": "k2"}, "k3 or exact, got k2"),
        ({"objective": "coupled", "stepwise": False, "prompt_masking": 0.3}, "does not read it"),
        ({"mask_samples": 3}, "stepwise does not read it"),
        ({"objective": "coupled", "stepwise": False, "strategy": "uniform"}, "denoising steps"),
        ({"objective": "coupled", "stepwise": False, "schedule": "per_step"}, "denoising steps"),
        ({"objective": "sandwich", "stepwise": False, "bound_power": 0.5}, ">= 1, got 0.5"),
        ({"bound_share": 1.5}, r"in \[0, 1\], got 1.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, algorithm: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, {"algorithm": algorithm})


@pytest.mark.parametrize(("option", "value"), [("cache", "dual"), ("guidance", 1.0)])
def test_no_rollout_was_at_a_canvas_that_is_masked_again(
    tmp_path: Path, option: str, value: Any
) -> None:
    changes = {
        "algorithm": {"objective": "mean_field", "stepwise": False},
        "generation": {option: value},
    }
    with pytest.raises(ConfigError, match=rf"needs generation\.{option}"):
        config(tmp_path, changes)


@pytest.mark.parametrize(
    ("preset", "objective"),
    [
        ("d1", "mean_field"),
        ("wd1", "weighted"),
        ("coupled-grpo", "coupled"),
        ("espo", "sequence_elbo"),
        ("spg", "sandwich"),
    ],
)
def test_a_run_by_preset(tmp_path: Path, preset: str, objective: str) -> None:
    beta = PRESETS[preset]["algorithm"]["beta"]
    recipe = Path(__file__).parents[2] / "recipes" / "sudoku_tiny.yaml"
    loaded = load_config(recipe, [f"algorithm.preset={preset}", f"algorithm.beta={beta}"])
    assert (loaded.algorithm.objective, loaded.algorithm.beta) == (objective, beta)
    trainer = Trainer(config(tmp_path, PRESETS[preset], {"algorithm": {"beta": 0.0}}))
    algorithm = trainer.config.algorithm
    assert algorithm.objective == objective and not algorithm.stepwise
    metrics = merge([trainer.iteration.run(1, [0, 1, 2], 0)])
    assert metrics["updates"] == algorithm.num_iterations and metrics["grad_norm"] > 0
    assert metrics["ratio/drift"] == (None if objective in ("weighted", "sandwich") else 0.0)


def test_what_is_not_estimated_is_refused(tmp_path: Path) -> None:
    run = config(tmp_path, {"algorithm": {"objective": "coupled", "stepwise": False}})
    with pytest.raises(ValueError, match="stepwise alone, got coupled"):
        Planner(run, 1, Shares())
