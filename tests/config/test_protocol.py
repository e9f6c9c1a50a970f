"""``protocol: published``: what it fills in, what wins over it, and what it amounts to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from egspo.config.convert import ConfigError
from egspo.config.protocol import deviations
from egspo.config.recipe import load_config, load_with_origins, save_config
from egspo.models import add_lora, model_on_meta, new_config

RECIPES = Path(__file__).parents[2] / "recipes"
SUDOKU = RECIPES / "llada_8b_sudoku.yaml"
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("recipe", ["sudoku", "countdown", "gsm8k", "math500"])
def test_every_recipe_of_llada_follows_it_by_one_override(recipe: str) -> None:
    config = load_config(RECIPES / f"llada_8b_{recipe}.yaml", ["protocol=published"])
    assert deviations(config) == ["task.max_prompt_tokens=None (published: 200)"]
    assert config.prompts_per_step * config.algorithm.group_size == 6 * 8
    assert config.algorithm.update_ranks(8) == [[1, 2], [3, 4], [5, 6], [7, 0]]
    cut = load_config(
        RECIPES / f"llada_8b_{recipe}.yaml", ["protocol=published", "task.max_prompt_tokens=200"]
    )
    assert deviations(cut) == []


def test_what_is_said_wins_over_it_and_is_named() -> None:
    config, origins = load_with_origins(SUDOKU, ["protocol=published", "algorithm.beta=0"])
    assert config.algorithm.beta == 0
    assert "algorithm.beta=0.0 (published: 0.04)" in deviations(config)
    assert origins["generation.policy"] == "protocol published"
    assert origins["algorithm.beta"] == "override"
    assert config.task.options["test_grids"] == 48


def test_in_a_recipe_it_only_fills_what_is_left_out(write: Write) -> None:
    text = "model: {path: m}\ntask: {name: gsm8k}\nprotocol: published\n"
    filled = load_config(write(text))
    assert filled.model.lora is not None and filled.model.lora.rank == 128
    assert filled.task.options == {"protocol": "published"}
    own = load_config(write(f"{text}generation: {{policy: margin}}\n"))
    assert (own.generation.policy, own.generation.early_exit) == ("margin", False)
    # The whole model, or an adapter that there is, gets no other.
    assert load_config(write(text.replace("m}", "m, lora: null}"))).model.lora is None
    assert load_config(write(text.replace("m}", "m, adapter: a}"))).model.lora is None


@pytest.mark.parametrize(
    ("preset", "method"),
    [
        ("egspo", ("high_entropy", False)),
        ("egspo-sa", ("high_entropy", True)),
        ("uniform", ("uniform_reference", False)),
        ("random", ("random_reference", False)),
    ],
)
def test_the_method_is_the_presets(preset: str, method: tuple[str, bool]) -> None:
    config = load_config(SUDOKU, ["protocol=published", f"algorithm.preset={preset}"])
    assert (config.algorithm.strategy, config.algorithm.stepwise) == method
    assert config.algorithm.stop_at_eos is False


def test_it_loads_back_as_it_was_saved(tmp_path: Path) -> None:
    config = load_config(SUDOKU, ["protocol=published", "model.lora.rank=4"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_tasks_without_published_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"protocol: published has no prompts .*: kodcode"):
        load_config(RECIPES / "llada_8b_code.yaml", ["protocol=published"])


def test_options_have_bounds(write: Write) -> None:
    for override, message in (
        ("algorithm.ranks_per_update=0", "algorithm.ranks_per_update must be > 0, got 0"),
        ("algorithm.first_rank=-1", "algorithm.first_rank must be >= 0, got -1"),
        ("task.max_prompt_tokens=0", "task.max_prompt_tokens must be > 0"),
        ("max_empty_steps=0", "max_empty_steps must be > 0, got 0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config(SUDOKU, [override])


def test_what_an_adapter_of_llada_8b_trains() -> None:
    """168 M on the four projections that the authors' list names, 336 M on all seven."""
    sizes = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288}
    trained = {}
    published = load_config(SUDOKU, ["protocol=published"]).model.lora
    assert published is not None
    for name, targets in (("published", published.target_modules), ("all", None)):
        model = model_on_meta(new_config({**sizes, "vocab_size": 64}))
        with torch.device("meta"):
            adapted = add_lora(
                model, rank=128, alpha=64, dropout=0.05, target_modules=targets, seed=0
            )
        trained[name] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    wide, deep = 128 * (4096 + 4096) * 32, 128 * (4096 + 12288) * 32
    assert trained == {"published": 3 * wide + deep, "all": 4 * wide + 3 * deep}
    assert [round(n / 1e6) for n in trained.values()] == [168, 336]
