from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from egspo.config import PRESETS, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from egspo.config.convert import ConfigError, from_mapping
from egspo.config.presets import preset_values
from egspo.config.recipe import config_to_dict, load_config, save_config

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(set(FOLDER.glob("**/*.yaml")) - set(FOLDER.glob("sweeps/*.yaml")))
MODEL = "model: {path: some/model}\n"

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_recipe(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def default() -> TrainConfig:
    return TrainConfig(ModelConfig(path="some/model"))


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(path) in str(caught.value)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_saves_and_loads_back_as_equal(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_defaults_and_types(write: Write) -> None:
    config = load_config(write(MODEL + "optimizer: {betas: [0, 0.8], eps: 1e-9}\nsft: {}\n"))
    assert replace(config, optimizer=OptimizerConfig(), sft=None) == default()
    assert config.optimizer.betas == (0.0, 0.8)
    assert [type(beta) for beta in config.optimizer.betas] == [float, float]
    assert config.optimizer.eps == 1e-9
    assert config.sft is not None


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "+1E-4", "0.0001", ".0001"])
def test_every_way_to_write_a_number(write: Write, text: str) -> None:
    path = write(f"{MODEL}optimizer: {{learning_rate: {text}}}\ntask: {{options: {{x: {text}}}}}")
    config = load_config(path)
    assert config.optimizer.learning_rate == config.task.options["x"] == 1e-4


def test_yaml_1_1_words_are_strings_and_integers_stay_integers(write: Write) -> None:
    options = "{a: no, b: on, c: 1:30, d: 2024-01-01, e: 012, f: 20_000, g: '1e3', h: true}"
    config = load_config(write(f"{MODEL}mixed_precision: no\ntask: {{options: {options}}}"))
    assert config.mixed_precision == "no"
    assert config.task.options == {
        **{"a": "no", "b": "on", "c": "1:30", "d": "2024-01-01", "e": "012"},
        **{"f": 20000, "g": "1e3", "h": True},
    }


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
)
AWKWARD = st.sampled_from(["1e3", "no", "1:30", "012", "~", "", "<<", "0x1f", "1_0", ".inf", "é\n"])


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=4),
        st.recursive(SCALARS | AWKWARD, lambda inner: st.lists(inner, max_size=3), max_leaves=4),
        max_size=4,
    )
)
@pytest.mark.slow
def test_free_options_survive_saving(options: dict[str, object]) -> None:
    config = default()
    config.task.options = options
    with tempfile.TemporaryDirectory() as folder:
        save_config(config, Path(folder, "config.yaml"))
        assert load_config(Path(folder, "config.yaml")) == config


def test_overrides(write: Write) -> None:
    path = write("model: {config: {d_model: 8}}\nseed: 1\ntask: {options: {a: 1, b: 2}}\n")
    config = load_config(
        path,
        [
            "seed=2",
            "seed=3",
            "task.options.b=[1, x]",
            "model.lora.rank=4",
            "model.config.d_model=16",
            "output_dir=runs/a=b",
            "sft.optimizer.learning_rate=1e-2",
        ],
    )
    assert config.seed == 3
    assert config.task.options == {"a": 1, "b": [1, "x"]}
    assert config.model.lora == LoraConfig(rank=4)
    assert config.model.config == {"d_model": 16}
    assert config.output_dir == "runs/a=b"
    assert config.sft is not None and config.sft.optimizer.learning_rate == 0.01
    switched = load_config(path, ["model.config=null", "model.path=hub/name"])
    assert switched.model == ModelConfig(path="hub/name")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': expected dotted.path=value"),
        ("=3", "override '=3': expected dotted.path=value"),
        ("a..b=3", "override 'a..b=3': expected dotted.path=value"),
        ("seed.x=3", "override 'seed.x=3': seed is 1, not a section"),
        ("seed=[1", "override 'seed=[1': the value is not valid YAML"),
        ("seed=one", "seed: expected an integer, got the string 'one'"),
        ("sed=1", "sed: unknown key; did you mean seed?"),
    ],
)
def test_bad_overrides(write: Write, override: str, message: str) -> None:
    (problem,) = problems(write(f"{MODEL}seed: 1\n"), override)
    assert problem.startswith(message)


def test_a_partial_section_keeps_the_defaults_of_its_place(write: Write) -> None:
    config = load_config(write(f"{MODEL}sft: {{optimizer: {{learning_rate: 0.5}}}}\neval:\n"))
    assert config.sft is not None
    assert config.sft.optimizer.max_grad_norm == 1.0 != OptimizerConfig().max_grad_norm
    assert config.sft.optimizer.weight_decay == 0.01
    assert config.optimizer == OptimizerConfig()
    assert config.eval.every == 10


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_what_is_left_out(write: Write, preset: str) -> None:
    config = config_to_dict(load_config(write(f"{MODEL}algorithm: {{preset: {preset}}}\n")))
    overridden = config_to_dict(load_config(write(MODEL), [f"algorithm.preset={preset}"]))
    assert config == overridden
    for section, values in preset_values(preset, {}).items():
        assert values.items() <= config[section].items()


def test_a_preset_takes_the_value_of_another_option(write: Write) -> None:
    path = write(f"{MODEL}generation: {{max_new_tokens: 64}}\nalgorithm: {{preset: just-grpo}}\n")
    assert load_config(path).generation.steps == 64
    assert load_config(path, ["generation.max_new_tokens=96"]).generation.steps == 96
    assert load_config(path, ["generation.steps=32"]).generation.steps == 32
    path = write(f"{MODEL}generation: {{max_new_tokens: 64, steps: 32}}\n")
    (problem,) = problems(path, "algorithm.preset=just-grpo")
    assert "means generation.steps=64, but the recipe itself sets 32" in problem


def test_recipe_wins_over_its_preset_and_overrides_over_both(write: Write) -> None:
    path = write(f"{MODEL}algorithm: {{preset: reference, schedule: joint}}\n")
    config = load_config(path)
    assert config.algorithm.schedule == "joint"
    assert config.algorithm.ratio_temperature == "one"
    assert config.generation.policy == "low_confidence"
    config = load_config(path, ["generation.policy=margin", "algorithm.schedule=per_step"])
    assert (config.generation.policy, config.algorithm.schedule) == ("margin", "per_step")


def test_preset_by_override_replaces_the_recipes(write: Write) -> None:
    path = write(f"{MODEL}algorithm: {{preset: reference}}\n")
    config = load_config(path, ["algorithm.preset=egspo"])
    expected = load_config(write(f"{MODEL}algorithm: {{preset: egspo}}\n"))
    assert config == expected


def test_preset_by_override_that_the_recipe_contradicts_is_refused(write: Write) -> None:
    path = write(f"{MODEL}algorithm: {{preset: egspo-sa, stepwise: true, strategy: uniform}}\n")
    strategy, stepwise = problems(path, "algorithm.preset=egspo")
    assert "means algorithm.strategy=high_entropy, but the recipe itself sets uniform" in strategy
    assert "means algorithm.stepwise=False, but the recipe itself sets True" in stepwise
    settled = ["algorithm.preset=egspo", "algorithm.stepwise=false", "algorithm.strategy=uniform"]
    config = load_config(path, settled)
    assert (config.algorithm.stepwise, config.algorithm.strategy) == (False, "uniform")
    assert load_config(path, ["algorithm.preset=egspo-sa"]) == load_config(path)


def test_all_problems_are_reported_at_once(write: Write) -> None:
    path = write(
        """
model: {path: m, rank: 4}
generation: {steps: 7.5, temprature: 1.0, policy: best}
optimizer: {learning_rate: fast, betas: [0.9], eps: true}
task: {options: 3, reward_weights: {correct: high}}
trackers: [tensorboard, mlflow]
eval: {every: -1}
stepz: 3
nonsense: 1
"""
    )
    found = problems(path, "checkpoint.every=1.0")
    assert {problem.partition(":")[0]: problem.partition(": ")[2] for problem in found} == {
        "model.rank": "unknown key; did you mean model.lora.rank?",
        "generation.steps": "expected an integer, got 7.5",
        "generation.temprature": "unknown key; did you mean generation.temperature?",
        "generation.policy": (
            "expected one of low_confidence, random, max_prob, margin, entropy, "
            "entropy_bounded, left_to_right, got the string 'best'"
        ),
        "optimizer.learning_rate": "expected a finite number, got the string 'fast'",
        "optimizer.betas": "expected a list of 2 items, each a finite number, got the list [0.9]",
        "optimizer.eps": "expected a finite number, got True",
        "task.options": "expected a section (key: value) with strings as keys, got 3",
        "task.reward_weights.correct": "expected a finite number, got the string 'high'",
        "trackers[1]": "expected one of tensorboard, wandb, got the string 'mlflow'",
        "eval.every must be >= 0, got -1": "",
        "stepz": "unknown key; did you mean steps?",
        "nonsense": f"unknown key; known here: {', '.join(config_to_dict(default()))}",
        "checkpoint.every": "expected an integer, got 1.0",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing but a comment\n", "the file is empty"),
        ("- a\n- b\n", "expected sections (key: value), got the list ['a', 'b']"),
        ("seed: 1\nmodel:\n  path: a\n  path: b\n", "key 'path' is given twice (line 4, column 3)"),
        ("seed: 1\nseed: 1\n", "key 'seed' is given twice (line 2, column 1)"),
        ("model: [1\n", "not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("seed: 1\n", "model: required, and missing"),
        ("model: {path: m}\noptimizer: {learning_rate: .nan}\n", "optimizer.learning_rate: expe"),
        ("model: {path: m}\n1: 2\n", "1: unknown key"),
        ("model: {config: {1: 2}}\n", "model.config: expected a section"),
        ("model: {path: m}\nsft: true\n", "sft: expected a section (key: value), got True"),
    ],
)
def test_bad_files(write: Write, text: str, message: str) -> None:
    (problem,) = problems(write(text))
    assert message in problem


def test_checks_of_a_section_name_it(write: Write) -> None:
    (problem,) = problems(write(f"{MODEL}sft: {{optimizer: {{learning_rate: 0}}}}\n"))
    assert problem == "sft.optimizer: learning_rate must be > 0, got 0.0"


def test_missing_files(write: Write, tmp_path: Path) -> None:
    write(MODEL)
    with pytest.raises(FileNotFoundError, match=r"recip.yaml; did you mean .*recipe\.yaml\?"):
        load_config(tmp_path / "recip.yaml")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_config(tmp_path / "nowhere" / "recipe.yaml")
    with pytest.raises(ConfigError, match="this is a folder"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xe9\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_saved_strings_are_strings_to_other_yaml_readers_too(tmp_path: Path) -> None:
    config = default()
    config.task.options = {"a": "no", "b": "1e3", "c": "2024-01-01"}
    save_config(config, tmp_path / "config.yaml")
    loaded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert loaded["task"]["options"] == config.task.options


def test_from_mapping_takes_any_section() -> None:
    assert from_mapping(LoraConfig, {"rank": 2}, "here") == LoraConfig(rank=2)
    with pytest.raises(ConfigError, match=r"^here: rnk: unknown key; did you mean rank\?"):
        from_mapping(LoraConfig, {"rnk": 2}, "here")
