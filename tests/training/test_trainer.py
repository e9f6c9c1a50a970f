"""Whole training runs on a tiny model: every algorithm runs, learns, and records what it did."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from egspo.algorithm.advantages import egspo_sa_advantages
from egspo.algorithm.iteration import Iteration
from egspo.cli import main
from egspo.config import PRESETS
from egspo.config.presets import preset_values
from egspo.config.recipe import load_config
from egspo.runs.metrics import read_metrics
from egspo.tasks import Reward
from egspo.training.trainer import Trainer, train
from tests.helpers import runs
from tests.helpers.runs import LETTERS

LORA = {"model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.5}}}
# Metrics of every step of every run.
EVERY_STEP = {
    *("step", "reward/mean", "reward/std", "reward/cell_accuracy", "solved", "length/mean"),
    *("entropy/mean", "selected/histogram", "selected/states", "selected/entropy", "selected/k"),
    *("skipped/rewards", "skipped/groups", "skipped/states", "skipped/steps"),
    "reward/equal_groups",
    *("advantage/mean", "advantage/std", "advantage/max"),
    *("updates", "loss", "ratio/mean", "ratio/max", "ratio/drift", "ratio/clamped", "staleness"),
    *("clip/low", "clip/high", "kl", "grad_norm", "lr", "speed/tokens_per_second"),
    *("flops/rollout", "flops/score", "flops/update", "memory/peak", "rollout/forwards"),
    *("rollout/saved", "rollout/head_rows", "rollout/logits_bytes", "rollout/cache_bytes"),
    *(
        f"time/{phase}"
        for phase in ("rollout", "reward", "select", "score", "update", "step", "processor")
    ),
}
EVALUATED = {"eval/reward", "eval/cell_accuracy", "eval/solved", "eval/skipped", "time/eval"}


def recipe_file(folder: Path, *changes: dict[str, Any]) -> Path:
    """The tiny recipe as a user writes it."""
    tree = json.loads(json.dumps(runs.RECIPE))
    for change in ({"output_dir": str(folder / "run")}, *changes):
        runs.update(tree, change)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_from_recipe_to_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = recipe_file(tmp_path), tmp_path / "run"
    assert main(["train", str(recipe), "algorithm.preset=egspo-sa", "eval.every=3"]) == 0
    assert load_config(run / "config.yaml") == load_config(
        recipe, ["algorithm.preset=egspo-sa", "eval.every=3"]
    )
    assert (run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    records = read_metrics(run)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert set(records[0]) == {"step", *EVALUATED}
    for record in records[1:]:
        evaluated = EVALUATED if record["step"] in (3, 4) else set()
        stepwise = {"step_reward/mean", "skipped/step_rewards", "time/step_reward"}
        assert set(record) == EVERY_STEP | stepwise | evaluated
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000004",
    ]
    capsys.readouterr()
    assert main(["generate", "--model", str(run), "--prompt", "1234\n0000\n2143\n4321"]) == 0
    answer = capsys.readouterr().out
    assert set(answer) <= set("01234\n")
    trained = load_config(run / "config.yaml").generation
    stored = json.loads((run / "final" / "model" / "egspo_generation.json").read_text())
    assert stored["steps"] == trained.steps == 5


def _objective(preset: str) -> str:
    return str(PRESETS[preset]["algorithm"].get("objective", "stepwise"))


# JustGRPO trains every step, of another rollout.
OTHERS = sorted(p for p in PRESETS if _objective(p) != "stepwise" or p == "just-grpo")


@pytest.mark.parametrize("preset", OTHERS)
def test_presets_of_other_methods(preset: str, tmp_path: Path, no_plots: None) -> None:
    wanted = {
        f"{s}.{k}": v for s, vs in preset_values(preset, runs.RECIPE).items() for k, v in vs.items()
    }
    overrides = [f"{path}={json.dumps(value)}" for path, value in wanted.items()]
    config = load_config(recipe_file(tmp_path), [f"algorithm.preset={preset}", *overrides])
    train(config)
    records = read_metrics(tmp_path / "run")[1:]
    assert sum(record["updates"] for record in records) > 0
    for record in records:
        assert (record["ratio/drift"] or 0.0) < runs.DRIFT
        assert record["loss"] is None or math.isfinite(record["loss"])


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - set(OTHERS)))
def test_presets(preset: str, tmp_path: Path, no_plots: None) -> None:
    recipe = recipe_file(tmp_path)
    config = load_config(recipe, [f"algorithm.preset={preset}", "algorithm.stop_at_eos=false"])
    for section, values in PRESETS[preset].items():
        for name, value in values.items():
            assert getattr(getattr(config, section), name) == (
                False if name == "stop_at_eos" else value
            )
    train(config)
    for record in read_metrics(tmp_path / "run")[1:]:
        assert set(record) >= EVERY_STEP
        assert (record["ratio/drift"] is None) == (record["updates"] == 0)
        assert (record["ratio/drift"] or 0.0) < runs.DRIFT
        assert record["reward/mean"] == record["reward/cell_accuracy"]
        groups = 2 - record["skipped/groups"]
        stepwise = preset in ("egspo-sa", "reference")
        assert record["skipped/groups"] == (0 if stepwise else record["reward/equal_groups"])
        assert sum(record["selected/histogram"]) == record["selected/states"] == groups * 4 * 3
        assert record["updates"] <= (0 if not groups else 3 if preset == "reference" else 1)
        assert record["updates"] > 0 or record["skipped/states"] == record["selected/states"]
        assert record["selected/k"] == 3
        assert ("step_reward/mean" in record) == (preset in ("egspo-sa", "reference"))
        assert record["kl"] is None
        if preset == "uniform":
            assert record["selected/histogram"] == [groups * 4, 0] * 2 + [groups * 4]


COMBINATIONS: list[dict[str, Any]] = [
    {"algorithm": {"returns": "split", "lam_schedule": "late", "scale_by_std": True}},
    {"algorithm": {"baseline": "group", "normalize_returns": False, "schedule": "per_step"}},
    {"algorithm": {"aggregation": "mean", "beta": 0.1, "num_iterations": 2}},
    {"algorithm": {"aggregation": "exact", "kl": "exact", "beta": 0.1}, **LORA},
    {"algorithm": {"kl": "exact", "beta": 0.1, "schedule": "per_step"}, "micro_batch_size": 3},
    {"algorithm": {"beta": 0.1, "schedule": "per_step", "stepwise": False}, **LORA},
    {"algorithm": {"strategy": "all", "entropy_over": "block", "beta": 0.1}},
    {"algorithm": {"entropy_over": "masked", "entropy_reduce": "sum"}},
    {"algorithm": {"entropy_at": "sampling", "ratio_temperature": "one"}},
    {"generation": {"policy": "random", "temperature": 1.3}, "mixed_precision": "bf16"},
    {"model": {"gradient_checkpointing": True, "attn_implementation": "eager"}},
    {"generation": {"cache": "dual"}, "algorithm": {"beta": 0.1, "kl": "exact"}, **LORA},
    {"generation": {"cache": "prefix"}, "model": {"gradient_checkpointing": True}},
    {"generation": {"cache": "dual"}, "algorithm": {"schedule": "per_step", "beta": 0.1}},
    {"generation": {"cache": "dual", "guidance": 0.5}, "algorithm": {"detach_cache": True}},
    {"generation": {"threshold": 0.2, "cache": "prefix"}, "algorithm": {"strategy": "uniform"}},
]


@pytest.mark.parametrize(
    "changes",
    [
        changes if i % 3 == 0 else pytest.param(changes, marks=pytest.mark.slow)
        for i, changes in enumerate(COMBINATIONS)
    ],
    ids=range(len(COMBINATIONS)),
)
def test_combinations(
    changes: dict[str, Any], tmp_path: Path, no_plots: None, letters: list[Reward]
) -> None:
    """The ratio of the only update is 1, bit for bit, and the KL to the reference starts at 0.

    Prompts of different lengths, two blocks.
    """
    letters.append(Reward("varied", runs.varied))
    config = runs.config(tmp_path, LETTERS, changes)
    trainer = Trainer(config)
    before = {n: p.detach().clone() for n, p in trainer.denoiser.model.named_parameters()}
    trainer.run()
    first, *others = read_metrics(tmp_path)[1:]
    for record in (first, *others):
        assert record["ratio/drift"] < (0.3 if "mixed_precision" in changes else runs.DRIFT)
        if config.algorithm.schedule == "joint" and config.algorithm.num_iterations == 1:
            assert record["ratio/max"] == 1.0
        assert record["grad_norm"] > 0
    algorithm = config.algorithm
    if algorithm.beta > 0:
        if algorithm.schedule == "joint" and algorithm.num_iterations == 1:
            assert first["kl"] == pytest.approx(0.0, abs=1e-6)
        assert others[-1]["kl"] > 1e-6
    else:
        assert first["kl"] is None
    if algorithm.num_iterations > 1:
        assert first["ratio/max"] > 1.0  # the second epoch is off the policy by the first
    for name, parameter in trainer.denoiser.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == parameter.requires_grad, name
        assert parameter.requires_grad == ("lora_" in name or config.model.lora is None)


def test_an_adapter_is_continued(tmp_path: Path, no_plots: None) -> None:
    """From its own weights, which are the reference too."""
    train(runs.config(tmp_path / "base"))
    base = {"model": {"config": None, "path": str(tmp_path / "base" / "final" / "model")}}
    train(runs.config(tmp_path / "first", base, LORA))
    adapter = tmp_path / "first" / "final" / "adapter"
    continued = {"model": {"adapter": str(adapter)}, "algorithm": {"beta": 0.1}}
    config = runs.config(tmp_path / "second", base, continued)
    trainer = Trainer(config)
    trainer.run()
    first, *_, last = read_metrics(tmp_path / "second")[1:]
    assert first["ratio/drift"] < runs.DRIFT
    assert abs(first["kl"]) < 1e-6 < last["kl"]  # and not what the first run moved
    old, new = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (adapter, tmp_path / "second" / "final" / "adapter")
    )
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(
    ("stepwise", "pipeline"),
    [
        pytest.param(False, False, marks=pytest.mark.slow),
        (True, False),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_learns(
    stepwise: bool, pipeline: bool, tmp_path: Path, no_plots: None, letters: list[Reward]
) -> None:
    """Ones pay: after a few steps the model writes many more of them than at the start."""
    letters.append(Reward("ones", runs.ones))
    changes = {
        **LETTERS,
        "steps": 12,
        "prompts_per_step": 4,
        "algorithm": {"group_size": 8, "stepwise": stepwise, "stop_at_eos": False},
        "eval": {"every": 0, "temperature": 1.0},
        "checkpoint": {"every": 0},
        "pipeline": pipeline,
    }
    train(runs.config(tmp_path, changes))
    records = read_metrics(tmp_path)
    rewards = [record["reward/mean"] for record in records[1:]]
    assert rewards[0] < 0.2
    assert [record["staleness"] for record in records[1:]] == [0] + [int(pipeline)] * 11
    assert min(rewards[-3:]) > 0.6
    assert records[-1]["eval/reward"] > 0.6 > 0.2 > records[0]["eval/reward"]
    assert records[-1]["entropy/mean"] < records[1]["entropy/mean"]


def test_a_punished_token_goes_away(tmp_path: Path, no_plots: None, letters: list[Reward]) -> None:
    """The same with a negative weight: the sign of everything in between is right."""
    letters.append(Reward("ones", runs.ones))
    changes = {
        **LETTERS,
        "steps": 8,
        "prompts_per_step": 4,
        "task": {**LETTERS["task"], "reward_weights": {"ones": -1.0}},
        "algorithm": {"group_size": 8, "stop_at_eos": False},
        "generation": {"early_exit": False},
    }
    train(runs.config(tmp_path, changes))
    records = read_metrics(tmp_path)[1:]
    assert records[0]["reward/ones"] > 0.05
    assert records[0]["reward/mean"] == -records[0]["reward/ones"]
    assert records[-1]["reward/ones"] < 0.02


def test_the_global_random_state_is_neither_used_nor_touched(
    tmp_path: Path, no_plots: None
) -> None:
    changes = (LORA, {"algorithm": {"strategy": "random"}, "generation": {"policy": "random"}})
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        train(runs.config(tmp_path / str(seed), *changes))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]
        outcomes.append(runs.outcome(tmp_path / str(seed)))
    assert outcomes[0] == outcomes[1]
    train(runs.config(tmp_path / "other", *changes, {"seed": 3}))
    assert runs.outcome(tmp_path / "other") != outcomes[0]


def test_evaluation_does_not_depend_on_the_batch(tmp_path: Path, no_plots: None) -> None:
    """Greedy and sampled; puzzles are all of one length, so nothing is rounded differently."""
    for temperature in (0.0, 1.0):
        results = []
        for batch_size in (16, 2):
            output = tmp_path / f"{temperature}-{batch_size}"
            changes = {"eval": {"temperature": temperature}, "steps": 1}
            train(runs.config(output, changes, {"generation": {"batch_size": batch_size}}))
            record = read_metrics(output)[0]
            results.append({k: v for k, v in record.items() if k.startswith("eval/")})
        assert results[0] == results[1]


class Counted:
    """A reward function that keeps what it was asked."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, []  # type: ignore[var-annotated]

    def __call__(self, completions: list[str], **columns: Any) -> Any:
        self.calls.append(len(completions))
        return self.function(completions=completions, **columns)


@pytest.mark.parametrize(
    ("option", "scoring"), [(None, ["ones"]), (["twos"], ["twos"]), (["ones", "twos"], None)]
)
def test_which_rewards_score_one_step_completions(
    option: list[str] | None,
    scoring: list[str] | None,
    tmp_path: Path,
    no_plots: None,
    monkeypatch: pytest.MonkeyPatch,
    letters: list[Reward],
) -> None:
    """Others are not even called for them, and what they pay is not in the difference R - V."""
    functions = {"ones": Counted(runs.ones), "twos": Counted(runs.twos)}
    letters += [
        Reward("ones", functions["ones"], weight=2.0),
        Reward("twos", functions["twos"], weight=3.0, intermediate=False),
    ]
    seen = []

    def spy(rewards: Any, values: Any, valid: Any, lam: Any, **options: Any) -> Any:
        seen.append((rewards, options["step_rewards"]))
        return egspo_sa_advantages(rewards, values, valid, lam, **options)

    monkeypatch.setattr("egspo.algorithm.objectives.stepwise.egspo_sa_advantages", spy)
    task = {"name": "letters", "options": None, "intermediate_rewards": option}
    changes = {**LETTERS, "task": task, "algorithm": {"stop_at_eos": False}, "steps": 1}
    train(runs.config(tmp_path, changes, {"prompts_per_step": 3}))
    record = read_metrics(tmp_path)[1]
    states = record["selected/states"]
    assert states > 0
    for name, function in functions.items():
        first, *training, last = function.calls  # two evaluations around it
        assert 0 < first <= 4 and 0 < last <= 4
        # What was scored before, or twice in a part of the rollout, is not asked again.
        scores_steps = scoring is None or name in scoring
        assert 0 < sum(training) <= 12 + (states if scores_steps else 0)
    asked = {name: sum(function.calls) for name, function in functions.items()}
    if scoring is not None:
        (other,) = functions.keys() - set(scoring)
        assert asked[other] < asked[scoring[0]]
    ((rewards, step_rewards),) = seen
    if scoring is None:
        assert torch.equal(rewards, step_rewards)
    else:
        assert not torch.equal(rewards, step_rewards)
        unit = 8 / {"ones": 2.0, "twos": 3.0}[scoring[0]]
        assert torch.equal((step_rewards * unit).round(), step_rewards * unit)


def test_every_prompt_once_an_epoch_and_no_sequence_twice(
    tmp_path: Path, no_plots: None, monkeypatch: pytest.MonkeyPatch, letters: list[Reward]
) -> None:
    letters.append(Reward("varied", runs.varied))
    places: list[int] = []
    sequences: list[int] = []
    original = Iteration.produce

    def spy(self: Iteration, step: int, prompt_index: list[int], first_sequence: int) -> Any:
        places.extend(prompt_index)
        sequences.extend(range(first_sequence, first_sequence + 4 * len(prompt_index)))
        return original(self, step, prompt_index, first_sequence)

    monkeypatch.setattr(Iteration, "produce", spy)
    changes = {**LETTERS, "steps": 3, "prompts_per_step": 4}
    train(runs.config(tmp_path, changes))
    train(runs.config(tmp_path, changes, {"steps": 6}), resume=tmp_path)
    assert [sorted(places[i : i + 6]) for i in range(0, 24, 6)] == [list(range(6))] * 4
    assert sorted(set(sequences)) == list(range(6 * 4 * 4))
