"""QLoRA and 8-bit optimizers through bitsandbytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from egspo.config import LoraConfig, ModelConfig
from egspo.models import load_config, load_model, model_on_meta, new_model
from egspo.planning.memory import estimate_memory
from egspo.runs.metrics import read_metrics
from egspo.training.build import base_model, trainable_model
from egspo.training.trainer import train
from tests.helpers import runs

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW8bit

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "mask_token_id": 5, "eos_token_id": 1, "pad_token_id": 1}
LLADA = {**SIZES, "d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 128}
DREAM = {
    **SIZES,
    "model_type": "Dream",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
QLORA: dict[str, Any] = {"quantization": "nf4", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}


def checkpoint(folder: Path, fields: dict[str, Any]) -> str:
    model = new_model({**fields, "initializer_range": 0.1}, seed=0)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("fields", [LLADA, DREAM], ids=["llada", "dream"])
def test_projections_are_in_four_bits_and_nothing_else(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, fields)
    config = ModelConfig(path=path, quantization="nf4", lora=LoraConfig(rank=4, alpha=8))
    base = base_model(config, path, CPU)
    quantised = [name for name, m in base.named_modules() if isinstance(m, Linear4bit)]
    assert len(quantised) == 2 * 7
    plain = {name: m for name, m in base.named_modules() if type(m) is torch.nn.Linear}
    assert list(plain) == ["model.transformer.ff_out" if fields is LLADA else "lm_head"]
    (head,) = plain.values()
    assert head.weight.dtype == torch.float32

    ids = torch.randint(6, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = load_model(path)(input_ids=ids, compute_logits=True).logits
        rounded = base(input_ids=ids, compute_logits=True).logits
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-3 < float(error) < 0.3

    # The same weights, rounded but in float32, have the same logits and gradients.
    same = load_model(path)
    for name, module in base.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            same.get_submodule(name).weight.data.copy_(weight)
    results = []
    for each in (base, same):
        model = trainable_model(config, each, seed=0).eval()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)
        logits = model(input_ids=ids, compute_logits=True).logits
        logits.square().sum().backward()
        results.append((logits, {name: p.grad for name, p in trained.items()}))
    (logits, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-3)
    assert any(float(g.abs().max()) > 0.1 for g in gradients.values() if g is not None)


def recipe(tmp_path: Path, *changes: dict[str, Any]) -> Any:
    sft = {"sft": {"steps": 3, "batch_size": 4}, "model": QLORA, "algorithm": {"beta": 0.1}}
    wide = {"model": {"config": {"d_model": 64, "mlp_hidden_size": 64}}}
    return runs.config(tmp_path, sft, wide, *changes)


def test_a_run_on_a_four_bit_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ratio is 1, the reference is the base, and a resumed run is bit-identical."""
    monkeypatch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
    monkeypatch.setenv("EGSPO_CACHE", str(tmp_path / "cache"))
    train(recipe(tmp_path / "whole", {"steps": 4, "checkpoint": {"every": 2}}))
    records = read_metrics(tmp_path / "whole")
    updated = [record for record in records[1:] if record["updates"]]
    assert updated and all(record["ratio/max"] == 1.0 for record in updated)
    assert updated[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert (tmp_path / "whole/final/adapter/adapter_model.safetensors").is_file()

    train(recipe(tmp_path / "part", {"steps": 2, "checkpoint": {"every": 2}}))
    config = recipe(tmp_path / "part", {"steps": 4, "checkpoint": {"every": 2}})
    train(config, resume=tmp_path / "part")
    assert runs.outcome(tmp_path / "part") == runs.outcome(tmp_path / "whole")


def test_an_8_bit_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments are in 8 bits where tensors are large enough, and survive a checkpoint."""
    monkeypatch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
    optimizers = []
    init = AdamW8bit.__init__

    def spy(self: Any, *arguments: Any, **options: Any) -> None:
        optimizers.append(self)
        init(self, *arguments, **options)

    monkeypatch.setattr(AdamW8bit, "__init__", spy)
    wide = {"model": {"config": {"d_model": 64, "mlp_hidden_size": 64}}}
    eight = {"optimizer": {"name": "adamw_8bit"}, "checkpoint": {"every": 2}}
    train(runs.config(tmp_path / "whole", wide, eight, {"steps": 4}))
    kinds = {state["state1"].dtype for state in optimizers[0].state.values()}
    assert torch.uint8 in kinds
    train(runs.config(tmp_path / "part", wide, eight, {"steps": 2}))
    train(runs.config(tmp_path / "part", wide, eight, {"steps": 4}), resume=tmp_path / "part")
    assert runs.outcome(tmp_path / "part") == runs.outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"quantization": "nf4"}}, "nf4 freezes the weights: it needs model.lora"),
        ({"model": QLORA, "sft": None}, "nf4 needs trained weights: model.path, or an sft section"),
    ],
)
def test_configurations_that_cannot_work(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        runs.config(tmp_path, changes)


def test_what_is_missing_is_said_before_the_warm_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EGSPO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="paged_adamw_8bit pages between GPU and host memory"):
        train(recipe(tmp_path / "a", {"optimizer": {"name": "paged_adamw_8bit"}}))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    for changes in ({}, {"model": {"quantization": "none"}, "optimizer": {"name": "adamw_8bit"}}):
        with pytest.raises(ValueError, match=r"(quantization|name): .* pip install 'egspo\[bits"):
            train(recipe(tmp_path / "b", changes))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fields", [LLADA, DREAM], ids=["llada", "dream"])
def test_the_memory_estimate_counts_four_bits(fields: dict[str, Any], tmp_path: Path) -> None:
    """Of tensors whose blocks come out even, to the byte."""
    wide = "d_model" if fields is LLADA else "hidden_size"
    deep = "mlp_hidden_size" if fields is LLADA else "intermediate_size"
    fields = {**fields, wide: 512, deep: 512, "num_key_value_heads": 2}
    path = checkpoint(tmp_path, fields)
    run = runs.config(
        tmp_path / "run",
        {"model": {"config": None, "path": path, **QLORA}, "algorithm": {"beta": 0.0}},
        {"optimizer": {"name": "adamw_8bit"}},
    )
    base = base_model(run.model, path, CPU)
    actual = 0
    for module in base.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            tensors = (module.weight, state.absmax, state.state2.absmax)
            actual += sum(t.numel() * t.element_size() for t in tensors)
    model = trainable_model(run.model, model_on_meta(load_config(path)), seed=0)
    items = {item.name: item.bytes for item in estimate_memory(run, model, prompt_tokens=20)}
    assert items["projections in 4 bits"] == actual
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert items["optimizer"] == int(adapters * 2 * (1 + 4 / 256))
    kept = sum(p.numel() * 4 for n, p in base.named_parameters() if p.dtype == torch.float32)
    assert items["frozen weights"] == kept
