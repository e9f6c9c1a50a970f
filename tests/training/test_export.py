"""Exported checkpoints compute what the adapter on its base does, and load like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from egspo.cli import main
from egspo.config import GenerationConfig
from egspo.files import PARTIAL, CheckpointError
from egspo.models import add_lora, load_adapter, load_model, load_tokenizer, new_model
from egspo.models.tokenization import character_tokenizer
from egspo.runs.lock import LOCK, RunLockedError
from egspo.runs.published import verify_published
from egspo.serving.named_model import GENERATION_FILE, save_generation_config
from egspo.training.export import ExportError, export
from egspo.training.trainer import train
from egspo.training.warm_start import run_sft
from tests.helpers import runs
from tests.helpers.runs import LETTERS

TOKENIZER = character_tokenizer()
MODELS: dict[str, dict[str, Any]] = {
    "llada": {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 24},
    "Dream": {
        "model_type": "Dream",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
    },
}
LORA = {"model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}}
SFT = {"sft": {"steps": 2, "batch_size": 4}}
IDS = torch.arange(12)[None] % len(TOKENIZER)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
    monkeypatch.setenv("EGSPO_CACHE", str(tmp_path / "cache"))
    runs.rewards[:] = [runs.Reward("varied", runs.varied)]
    yield
    runs.rewards.clear()


def adapter_on(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A base, and an adapter that is far from zero, in folders."""
    tokens = {f"{n}_token_id": getattr(TOKENIZER, f"{n}_token_id") for n in ("mask", "eos", "pad")}
    fields = {**MODELS[kind], **tokens, "vocab_size": len(TOKENIZER), "init_std": 0.2}
    if kind == "Dream":
        fields["initializer_range"] = fields.pop("init_std")
    model = new_model(fields, seed=0).to(dtype)
    base, adapter = folder / "base-model", folder / "adapter"
    model.save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    adapted = add_lora(load_model(base), rank=4, alpha=8, dropout=0.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(adapter)
    save_generation_config(GenerationConfig(cache="dual"), adapter)
    return base, adapter


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return result


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_adapter(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapter = adapter_on(tmp_path, kind, dtype)
    output = tmp_path / "merged"
    exported = export(adapter, output, max_shard_size="5KB")
    assert (exported.folder, exported.base) == (output, str(base))
    # In float32, where the sum of base and adapter is not rounded.
    wide = load_adapter(load_model(base, dtype=torch.float32), adapter)
    expected = wide.merge_and_unload().state_dict()
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
    for model in (load_model(output), AutoModelForCausalLM.from_pretrained(output)):
        assert type(model) is type(load_model(base)) and model.dtype == dtype
        for name, tensor in model.state_dict().items():
            error = (tensor.float() - expected[name]).abs().max()
            assert error <= tolerance * expected[name].abs().max(), name
        if dtype == torch.float32:
            adapted = logits(load_adapter(load_model(base), adapter))
            torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(load_model(output)), logits(load_model(base)), atol=0.05)
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 1
    assert (output / "model.safetensors.index.json").is_file()
    official = set(load_model(base).state_dict())
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == official  # nothing of PEFT is left in a name
    assert load_tokenizer(output).get_vocab() == TOKENIZER.get_vocab()
    assert json.loads((output / GENERATION_FILE).read_text())["cache"] == "dual"
    verify_published(output)
    assert str(tmp_path) not in (output / "config.json").read_text()


def test_nothing_is_overwritten_or_left_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = adapter_on(tmp_path, "llada")
    output = tmp_path / "out" / "merged"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("egspo.training.export.shutil.copy", full)
        with pytest.raises(OSError, match="No space left"):
            export(adapter, output)
    assert not list(output.parent.iterdir())
    (output.parent / f"{PARTIAL}merged-1").mkdir()  # of a kill
    runs.hold_elsewhere(output.parent / f"{LOCK}-merged")
    with pytest.raises(RunLockedError, match=f"output {output} is in use by process"):
        export(adapter, output)
    (output.parent / f"{LOCK}-merged").unlink()
    export(adapter, output)
    assert list(output.parent.iterdir()) == [output]
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        export(base, output)
    assert (output / "model.safetensors").read_bytes() == before


def test_a_run_on_a_cached_warm_start(tmp_path: Path) -> None:
    """The base is in the run: neither export nor resuming needs the cache."""
    config = runs.config(tmp_path / "run", LETTERS, LORA, SFT, {"steps": 2})
    train(config)
    base = tmp_path / "run" / "base" / "model"
    cached = next((tmp_path / "cache" / "warm_start").glob("*/model"))
    assert (base / "model.safetensors").read_bytes() == (cached / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "moved").mkdir()
    run = (tmp_path / "run").rename(tmp_path / "moved" / "run")

    exported = export(run, tmp_path / "merged")
    assert exported.base == str(run / "base" / "model")
    adapted = load_adapter(load_model(run / "base" / "model"), run / "final" / "adapter")
    expected = logits(adapted)
    torch.testing.assert_close(logits(load_model(exported.folder)), expected, rtol=1e-4, atol=1e-5)
    step = run / "checkpoints" / "step-000002"
    assert export(step, tmp_path / "step").base == exported.base
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("merged", "step")]
    assert files[0] == files[1]

    config = runs.config(run, LETTERS, LORA, SFT, {"steps": 3})
    train(config, resume=run)
    assert not (tmp_path / "cache").exists()
    branch = runs.config(tmp_path / "branch", LETTERS, LORA, SFT, {"steps": 3})
    train(branch, resume=step)  # into another folder, which gets its own
    assert (tmp_path / "branch" / "base" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "cache").exists()

    (run / "base" / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"base is damaged: model/config\.json"):
        export(run, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"base is damaged: model/config\.json"):
        train(config, resume=run)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, False),
        ({"algorithm": {"beta": 0.1}}, True),
        (LORA, True),
    ],
)
def test_which_runs_keep_their_base(changes: dict[str, Any], kept: bool, tmp_path: Path) -> None:
    train(runs.config(tmp_path / "run", LETTERS, changes, {"steps": 1}))
    assert (tmp_path / "run" / "base").is_dir() == kept
    if "model" not in changes:
        final = str(tmp_path / "run" / "final" / "model")
        by_path = {"model": {"config": None, "path": final}}
        train(runs.config(tmp_path / "next", LETTERS, changes, by_path, {"steps": 1}))
        assert not (tmp_path / "next" / "base").exists()  # model.path has it


def test_supervised_adapters_too(tmp_path: Path) -> None:
    config = runs.config(tmp_path / "run", LORA, SFT)
    run_sft(config)
    assert export(tmp_path / "run", tmp_path / "out").base == str(tmp_path / "run/base/model")


def test_a_fully_trained_run_is_copied(tmp_path: Path) -> None:
    train(runs.config(tmp_path / "run", LETTERS, {"steps": 2}))
    final = tmp_path / "run" / "final" / "model"
    exported = export(tmp_path / "run", tmp_path / "out")
    assert exported.base is None
    names = {file.name for file in final.iterdir()}
    assert {file.name for file in exported.folder.iterdir()} == {*names, "manifest.json"}
    assert all((final / n).read_bytes() == (exported.folder / n).read_bytes() for n in names)
    with pytest.raises(ExportError, match="base is for adapters"):
        export(tmp_path / "run", tmp_path / "other", base="some/model")
    (final / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        export(tmp_path / "run", tmp_path / "other")


def test_what_there_is_to_export(tmp_path: Path) -> None:
    base, adapter = adapter_on(tmp_path, "llada")
    with pytest.raises(ExportError, match="no run, checkpoint, adapter or model"):
        export(tmp_path / "cache", tmp_path / "out")
    unfinished = tmp_path / "run"
    train(runs.config(unfinished, LETTERS, LORA, {"steps": 2}))
    shutil.rmtree(unfinished / "final")
    with pytest.raises(ExportError, match=r"newest checkpoint is .*step-000002"):
        export(unfinished, tmp_path / "out")
    with pytest.raises(ExportError, match="is an adapter"):
        export(adapter, tmp_path / "out", base=str(unfinished / "checkpoints" / "step-000002"))
    with pytest.raises(ValueError, match="does not fit"):
        export(adapter, tmp_path / "out", base=str(unfinished / "base"))

    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match=r"cannot be loaded: no model at .*; give base"):
        export(adapter, tmp_path / "out")
    assert export(adapter, tmp_path / "out", base=str(tmp_path / "elsewhere")).folder.is_dir()
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ExportError, match="does not say what the adapter was trained on"):
        export(adapter, tmp_path / "none")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = adapter_on(tmp_path, "llada")
    output = tmp_path / "merged"
    assert main(["export", str(adapter), "--output", str(output), "--base", str(base)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"base: {base}", f"model: {output}"]
    assert main(["export", str(adapter), "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
    options = ["--temperature", "0", "--max-new-tokens", "8", "--steps", "4", "--block-length", "4"]
    assert main(["generate", "--model", str(output), "--prompt", "1", *options]) == 0
