"""Dry runs: what they find, what they say they could not look at, and that they leave no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from peft import LoraConfig

from egspo.cli import main
from egspo.config.recipe import config_to_dict
from egspo.models import LLaDAConfig, add_lora, load_model, new_model
from egspo.models.tokenization import character_tokenizer
from egspo.planning.dry_run import ASSUMED_PROMPT_TOKENS, DryRun, dry_run
from egspo.sandbox import SandboxUnavailable
from tests.helpers.runs import MODEL, config

TOKENIZER = character_tokenizer()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def model_folder(folder: Path, weights: bool = False, **fields: Any) -> Path:
    """A folder with config.json and the tokenizer's files, and weights only if asked for."""
    tokens = {f"{n}_token_id": getattr(TOKENIZER, f"{n}_token_id") for n in ("mask", "eos", "pad")}
    everything = {**MODEL, **tokens, "vocab_size": len(TOKENIZER), **fields}
    LLaDAConfig(**everything).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    if weights:
        new_model(everything, seed=0).save_pretrained(folder)
    return folder


def by_path(folder: Path | str, **model: Any) -> dict[str, Any]:
    return {"model": {"config": None, "path": str(folder), **model}}


def statuses(report: DryRun) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def detail(report: DryRun, name: str) -> str:
    (found,) = [check.detail for check in report.checks if check.name == name]
    return found


def test_a_new_model_is_known_entirely(tmp_path: Path) -> None:
    sft = {"sft": {"steps": 2, "batch_size": 4}}
    report = dry_run(config(tmp_path / "run", sft))
    assert set(statuses(report).values()) == {"ok"}
    assert set(statuses(report)) == {
        *("trackers", "sampling", "tokenizer", "task", "prompts", "sft", "model"),
        *("special tokens", "context", "weights"),
    }
    assert "7 training, 0 validation, 5 test examples" in detail(report, "task")
    assert "cell_accuracy x 1" in detail(report, "task")
    assert report.prompts_known and report.prompt_tokens == 18
    assert report.memory
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_needs_no_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert not list(folder.glob("*.safetensors"))
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "ff_out"]}
    report = dry_run(config(tmp_path / "run", by_path(folder, lora=lora)))
    assert set(statuses(report).values()) == {"ok"}
    trained = 2 * (16 + 16) + 2 * (24 + 16)
    assert f"{trained} trained in adapters on 2 modules" in detail(report, "weights")
    assert "bfloat16" in detail(report, "weights")  # as it would be on a GPU


@pytest.mark.parametrize("weights", [False, True])
def test_no_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bool
) -> None:
    folder = model_folder(tmp_path / "model", weights=weights)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were opened")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse)
    assert not dry_run(config(tmp_path / "run", by_path(folder))).failed
    with pytest.raises(ValueError, match="weights were opened"):
        load_model(model_folder(tmp_path / "other", weights=True))


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_attention_need_not_be_installed_but_known(name: str, tmp_path: Path) -> None:
    model = {"model": {"attn_implementation": name}}
    assert not dry_run(config(tmp_path / "run", model)).failed
    model = {"model": {"attn_implementation": "flashy"}}
    (found,) = dry_run(config(tmp_path / "run", model)).failed
    assert "model.attn_implementation must be one of ['eager', 'flash_attention_2'" in found.detail


def test_an_adapter_to_continue_from(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", weights=True)
    adapter = add_lora(load_model(folder), rank=4, alpha=8, dropout=0.0, seed=0)
    adapter.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    report = dry_run(config(tmp_path / "run", by_path(folder, adapter=str(tmp_path / "adapter"))))
    assert "adapters on 7 modules" in detail(report, "weights") and not report.failed

    other = LoraConfig(r=4, target_modules=["nowhere"], peft_type="LORA")
    other.save_pretrained(tmp_path / "other")
    report = dry_run(config(tmp_path / "run", by_path(folder, adapter=str(tmp_path / "other"))))
    assert statuses(report)["weights"] == "failed" and "nowhere" in detail(report, "weights")


def test_what_is_on_the_hub_is_not_checked_offline(tmp_path: Path, offline: None) -> None:
    report = dry_run(config(tmp_path / "run", by_path("GSAI-ML/LLaDA-8B-Instruct")))
    assert not report.failed
    found = statuses(report)
    assert [name for name, status in found.items() if status == "not checked"] == [
        *("hub", "tokenizer", "prompts")
    ]
    assert found["task"] == "ok"
    assert "HF_HUB_OFFLINE is set" in detail(report, "hub")
    assert detail(report, "tokenizer") == "needs the hub"
    assert report.memory and "published sizes" in detail(report, "model")
    assert report.notes == [f"The hub cannot be reached; {detail(report, 'model')}."]


def test_a_model_that_nobody_published_is_not_known_offline(tmp_path: Path, offline: None) -> None:
    report = dry_run(config(tmp_path / "run", by_path("somebody/unknown")))
    assert statuses(report)["model"] == "not checked" and report.memory == []


def test_an_unreachable_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Session:
        def head(self, url: str, *, timeout: float) -> None:
            asked.append(url)
            raise ConnectionError("nobody there")

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("egspo.planning.hub.get_session", Session)
    monkeypatch.setattr("huggingface_hub.file_download.http_backoff", refused, raising=False)
    report = dry_run(config(tmp_path / "run", by_path("GSAI-ML/LLaDA-8B-Instruct")))
    assert len(asked) == 1 and "nobody there" in detail(report, "hub")
    assert sum("nobody there" in check.detail for check in report.checks) == 1
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_is_local_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egspo.planning.hub.get_session", lambda: pytest.fail("asked"))
    assert not dry_run(config(tmp_path / "run", by_path(model_folder(tmp_path / "model")))).failed


def test_the_recipe_chooses_the_attention_not_the_checkpoint(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", weights=True)
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    fields["attn_implementation"] = "flash_attention_2"  # not installed where tests run
    (folder / "config.json").write_text(json.dumps(fields), "utf-8")
    assert not dry_run(config(tmp_path / "run", by_path(folder))).failed
    assert load_model(folder).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("changes", "check", "message"),
    [
        (by_path("absent/folder/of/nobody"), "tokenizer", "absent"),
        ({"task": {"options": {"train_example": 3}}}, "task", "did you mean 'train_examples'"),
        ({"task": {"reward_weights": {"speed": 1.0}}}, "task", "names 'speed'"),
        ({"task": {"intermediate_rewards": []}}, "task", "algorithm.stepwise"),
        ({"model": {"config": {"max_sequence_length": 20}}}, "context", "context of 20"),
        ({"model": {"config": {"n_heads": 3}}}, "model", "n_heads"),
        ({"model": {"config": {"d_modle": 3}}}, "model", "d_modle"),
        ({"model": {"lora": {"target_modules": ["o_proj"]}}}, "weights", "'o_proj'"),
        ({"sft": {"task_options": {"careless": 2.0}}}, "sft", "careless"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)
def test_what_would_stop_the_run_is_found(
    tmp_path: Path, changes: dict[str, Any], check: str, message: str, offline: None
) -> None:
    report = dry_run(config(tmp_path / "run", changes))
    assert check in [found.name for found in report.failed]
    assert message in detail(report, check)


def test_trackers_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egspo.training.build.get_available_trackers", list)
    report = dry_run(config(tmp_path / "run", {"trackers": ["wandb"]}))
    assert "pip install 'egspo[wandb]'" in detail(report, "trackers")
    assert [check.name for check in report.failed] == ["trackers"]


def test_only_the_hub_may_be_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: type[Exception]) -> Any:
        def build(config: Any) -> Any:
            raise error("gone") from ConnectionError("refused")

        return build

    for error, status in ((OSError, "not checked"), (SandboxUnavailable, "failed")):
        monkeypatch.setattr("egspo.planning.dry_run.recipe_task", raising(error))
        report = dry_run(config(tmp_path / "run"))
        assert statuses(report)["task"] == status
        # The alphabet of a new model's tokenizer is the task's.
        assert statuses(report)["tokenizer"] == statuses(report)["model"] == "not checked"
    monkeypatch.setattr("egspo.planning.dry_run.recipe_task", raising(KeyError))
    with pytest.raises(KeyError):  # a defect keeps its traceback
        dry_run(config(tmp_path / "run"))


def test_without_prompts_the_estimate_says_what_it_assumes(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", max_sequence_length=512)
    changes = {"task": {"name": "sudoku", "options": {"path": str(tmp_path / "absent.csv")}}}
    report = dry_run(config(tmp_path / "run", by_path(folder), changes))
    assert [check.name for check in report.failed] == ["task"]
    assert statuses(report)["prompts"] == "not checked"
    assert report.prompt_tokens == ASSUMED_PROMPT_TOKENS and not report.prompts_known
    assert report.memory and statuses(report)["context"] == "ok"


# --- The command line


def recipe(folder: Path, *changes: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config(folder / "run", *changes))))
    return path


def test_the_command_prints_tables_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(path), "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    for text in ("parameters in float32", "activations", "optimizer", "peak", "longest prompt"):
        assert text in out


def test_a_finished_run_is_no_obstacle_and_is_left_alone(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text(json.dumps({"step": 0}) + "\n")
    assert main(["train", str(path), "--dry-run"]) == 0
    assert [file.name for file in metrics.parent.iterdir()] == ["metrics.jsonl"]


def test_exit_code_2_names_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path)
    override = "task.reward_weights={speed: 1.0}"
    assert main(["train", str(path), "--dry-run", override]) == 2
    captured = capsys.readouterr()
    assert "failed" in captured.out and captured.err.endswith("would not run: task\n")
    assert main(["train", str(path), "--dry-run", "steps=-1"]) == 2
    assert "steps" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_dry_run_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert main(["train", str(recipe(tmp_path)), "--dry-run", flag]) == 2
    assert "--dry-run starts nothing" in capsys.readouterr().err


def test_only_training_has_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["sft", str(recipe(tmp_path)), "--dry-run"])
