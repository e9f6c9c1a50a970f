"""The recipes as they are published: they load, hold the settings they claim, and dry-run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import egspo
from egspo.config.recipe import load_config
from egspo.models.published import published_config
from egspo.planning.dry_run import dry_run
from tests.helpers.chatml import EOS, MASK, write_tokenizer
from tests.sandbox.conftest import require_bubblewrap

FOLDER = Path(egspo.__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
HUB = {
    "llada_8b": "GSAI-ML/LLaDA-8B-Instruct",
    "dream_7b": "Dream-org/Dream-v0-Instruct-7B",
    "sdar_1.7b": "JetLM/SDAR-1.7B-Chat",
    "sdar_4b": "JetLM/SDAR-4B-Chat",
    "sdar_8b": "JetLM/SDAR-8B-Chat",
    "sdar_30b_a3b": "JetLM/SDAR-30B-A3B-Chat",
    "llada2_mini": "inclusionAI/LLaDA2.0-mini",
}
LARGE = [path for path in RECIPES if path.name.startswith(tuple(f"{name}_" for name in HUB))]
# Parameters, and modules that adapters are on.
SIZES = {
    "llada_8b": (8_015_581_184, 7 * 32),
    "dream_7b": (7_615_616_512, 7 * 28),
    "sdar_1.7b": (2_031_739_904, 7 * 28),
    "sdar_4b": (4_411_424_256, 7 * 36),
    "sdar_8b": (8_190_735_360, 7 * 36),
    "sdar_30b_a3b": (30_532_122_624, 4 * 48),
    "llada2_mini": (16_255_638_528, 5 * 20),
}
TASKS = ("code", "countdown", "gsm8k", "math500", "sudoku")

# arXiv 2603.12554 and its code, for LLaDA-8B-Instruct.
PUBLISHED: dict[str, dict[str, Any]] = {
    "generation": {
        "max_new_tokens": 256,
        "steps": 128,
        "temperature": 0.9,
    },
    "algorithm": {
        "group_size": 8,
        "selected_steps": 8,
        "stepwise": True,
        "lam": 0.5,
        "normalize_returns": True,
        "clip_low": 0.2,
        "clip_high": 0.5,
        "beta": 0.04,
        "kl": "k3",
    },
    "optimizer": {
        "learning_rate": 3e-5,
        "betas": (0.9, 0.99),
        "weight_decay": 0.1,
        "max_grad_norm": 0.2,
        "schedule": "constant",
    },
}


def model_of(path: Path) -> str:
    return path.stem.rpartition("_")[0]


def test_every_model_has_a_recipe_for_every_task() -> None:
    expected = {f"{model}_{task}.yaml" for model in HUB for task in TASKS}
    assert {path.name for path in LARGE} == expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_published_settings(path: Path) -> None:
    config = load_config(path)
    found = asdict(config)
    for section, settings in PUBLISHED.items():
        assert {name: found[section][name] for name in settings} == settings
    assert config.model.path == HUB[model_of(path)]
    blocks = getattr(published_config(HUB[model_of(path)]), "block_size", 32)
    assert config.generation.block_length == blocks
    lora = config.model.lora
    assert lora is not None and lora.target_modules is None
    assert (lora.rank, lora.alpha, lora.dropout) == (128, 64, 0.05)


@pytest.mark.parametrize("task", TASKS)
def test_models_differ_in_nothing_but_the_model(task: str) -> None:
    """And in how many states fit into a micro-batch, which changes no result."""
    trees = []
    for model in HUB:
        tree = asdict(load_config(FOLDER / f"{model}_{task}.yaml"))
        del tree["model"]["path"], tree["output_dir"], tree["generation"]["block_length"]
        del tree["micro_batch_size"]
        trees.append(tree)
    assert all(tree == trees[0] for tree in trees[1:])


# --- Dry runs: models of the published sizes by their config.json, data in the published format


def model_folder(folder: Path, model: str) -> Path:
    """The model's sizes, with the ids of a tokenizer that is small enough to be made here."""
    config = published_config(HUB[model])
    assert config is not None
    config.update({"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS})
    config.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def gsm8k(folder: Path) -> list[str]:
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)]
    return [
        f"task.options.train={lines(folder / 'train.jsonl', rows[:6])}",
        f"task.options.test={lines(folder / 'test.jsonl', rows[6:])}",
        "task.options.validation_examples=2",
    ]


def math(folder: Path) -> list[str]:
    pytest.importorskip("math_verify")
    rows = [{"problem": f"${i}+1$?", "solution": f"$\\boxed{{{i + 1}}}$"} for i in range(9)]
    return [
        f"task.options.train={lines(folder / 'train.jsonl', rows[:6])}",
        f"task.options.test={lines(folder / 'test.jsonl', rows[6:])}",
        "task.options.validation_examples=2",
    ]


def code(folder: Path) -> list[str]:
    require_bubblewrap()
    rows = [
        {
            "question": f"Write a function that adds {i}.",
            "solution": f"def add(x):\n    return x + {i}\n",
            "test": f"from solution import add\n\ndef test_add():\n    assert add(1) == {i + 1}\n",
            "test_info": [{"function_declaration": "def add(x):"}],
        }
        for i in range(9)
    ]
    return [
        f"task.options.train={lines(folder / 'train.jsonl', rows)}",
        "task.options.validation_examples=2",
        "task.options.test_examples=2",
    ]


def countdown(folder: Path) -> list[str]:
    return ["task.options.train=null", "task.options.train_examples=50"]


def sudoku(folder: Path) -> list[str]:
    return ["task.options.train_examples=50"]


DATA: dict[str, Callable[[Path], list[str]]] = {
    "code": code,
    "countdown": countdown,
    "gsm8k": gsm8k,
    "math500": math,
    "sudoku": sudoku,
}


def _fast_first(path: Path) -> Any:
    """Sudoku of every model, and the other tasks of each in the slow part."""
    marks = () if path.stem.endswith("_sudoku") else pytest.mark.slow
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", map(_fast_first, LARGE))
def test_recipes_dry_run(path: Path, tmp_path: Path) -> None:
    model, task = model_of(path), path.stem.rpartition("_")[2]
    folder = model_folder(tmp_path / "model", model)
    overrides = [f"model.path={folder}", *DATA[task](tmp_path)]
    report = dry_run(load_config(path, overrides))
    assert [(check.name, check.status) for check in report.checks if check.status != "ok"] == []
    (weights,) = [check.detail for check in report.checks if check.name == "weights"]
    parameters, modules = SIZES[model]
    assert f"{parameters:,} parameters in bfloat16" in weights
    assert f"adapters on {modules} modules" in weights
    assert {item.name for item in report.memory} >= {"frozen weights", "adapters", "activations"}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*_tiny.yaml")))
def test_the_small_recipes_dry_run(name: str) -> None:
    report = dry_run(load_config(FOLDER / f"{name}.yaml", ["task.options.train_examples=50"]))
    assert {check.status for check in report.checks} == {"ok"}
