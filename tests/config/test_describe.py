"""Options in words, and where the values of a run came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from egspo.cli import main
from egspo.config.describe import sections, to_markdown, with_origins
from egspo.config.recipe import config_to_dict, load_config, load_with_origins

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "sudoku_tiny.yaml"


def test_every_option_and_section_has_its_sentence() -> None:
    silent = [option.path for s in sections() for option in s.options if not option.text]
    assert not silent + [section.path for section in sections() if not section.text]


def test_every_key_of_a_saved_recipe_is_listed() -> None:
    listed = {option.path for section in sections() for option in section.options}
    listed |= {section.path for section in sections()}
    free = ("model.config", "task.options", "sft.task_options", "task.reward_weights")

    def keys(tree: dict[str, object], prefix: str = "") -> list[str]:
        found = []
        for name, value in tree.items():
            found.append(f"{prefix}{name}")
            if isinstance(value, dict) and f"{prefix}{name}" not in free:
                found += keys(value, f"{prefix}{name}.")
        return found

    assert set(keys(config_to_dict(load_config(RECIPE)))) <= listed


def test_the_page_of_options_is_todays() -> None:
    page = (ROOT / "docs" / "options.md").read_text("utf-8")
    assert page == to_markdown(), "make it again: egspo options --markdown > docs/options.md"


def test_options_of_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "algorithm"]) == 0
    output = capsys.readouterr().out
    assert "algorithm.selected_steps" in output
    assert "optimizer.learning_rate" not in output


def test_a_wrong_section_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "algoritm"]) == 2
    assert "did you mean algorithm?" in capsys.readouterr().err


def test_defaults_of_a_section_are_those_of_its_place() -> None:
    defaults = {o.path: o.default for section in sections() for o in section.options}
    assert defaults["optimizer.learning_rate"] == "3.0e-05"
    assert defaults["sft.optimizer.learning_rate"] == "0.001"


def test_each_value_says_what_it_came_from(tmp_path: Path) -> None:
    text = with_origins(*load_with_origins(RECIPE, ["algorithm.beta=0.1", "sft.steps=3"]))
    notes = dict(
        (line.split("#")[0].strip(), line.split("#")[1].strip())
        for line in text.splitlines()
        if "#" in line
    )
    assert notes["beta: 0.1"] == "override"
    assert notes["group_size: 8"] == "recipe"
    assert notes["strategy: high_entropy"] == "preset egspo-sa"
    assert notes["clip_low: 0.2"] == "default"
    assert notes["steps: 3"] == "override"
    assert notes["careless: 0.5"] == "recipe"
    file = tmp_path / "effective.yaml"
    file.write_text(text, "utf-8")
    assert load_config(file) == load_config(RECIPE, ["algorithm.beta=0.1", "sft.steps=3"])


def test_print_config_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ["train", str(RECIPE), "seed=3", "--print-config", "--output-dir", str(output)]
    assert main(command) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["seed"], tree["output_dir"]) == (3, str(output))
    assert not output.exists()
