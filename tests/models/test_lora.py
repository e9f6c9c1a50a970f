"""Low-rank adapters: what they touch, and files from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from egspo.models import LLaDAForMaskedLM, add_lora, load_adapter, reference_mode
from tests.families import disturb

MakeModel = Callable[..., LLaDAForMaskedLM]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
BLOCK_MODULES = {f"model.transformer.blocks.{n}.{name}" for n in range(2) for name in PROJECTIONS}
HEAD = "model.transformer.ff_out"


def adapted_modules(model: PeftModel) -> set[str]:
    names = (n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A"))
    return set(names)


def lora(model: LLaDAForMaskedLM, **options: Any) -> PeftModel:
    return add_lora(model, **{"rank": 4, "alpha": 8, "dropout": 0.0, "seed": 0, **options})


def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=input_ids).logits
    return result


@pytest.mark.parametrize("tied", [False, True])
def test_all_projections_and_never_the_head(
    make_model: MakeModel, input_ids: torch.Tensor, tied: bool
) -> None:
    model = make_model(weight_tying=tied, n_kv_heads=2)
    expected = logits(model, input_ids)
    adapted = lora(model, dropout=0.1)
    assert adapted_modules(adapted) == BLOCK_MODULES
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in name for name in trainable)
    assert torch.equal(logits(adapted.eval(), input_ids), expected)


def test_given_targets_never_reach_the_head(make_model: MakeModel) -> None:
    for targets in (["ff_out", "q_proj"], ["blocks.1.ff_out"]):
        expected = {m for m in BLOCK_MODULES if m.endswith(tuple(f".{t}" for t in targets))}
        assert adapted_modules(lora(make_model(), target_modules=targets)) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, ValueError, "'o_proj'.*has q_proj, k_proj"),
        ({"target_modules": []}, ValueError, r"must name a projection, .* got \[\]"),
        ({"target_modules": [HEAD]}, ValueError, "names no projection of a block"),
        ({"target_modules": "q_proj"}, TypeError, "list of names"),
        ({"rank": 0}, ValueError, "rank must be >= 1, got 0"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
    ],
)
def test_bad_options(
    make_model: MakeModel, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lora(make_model(), **options)


def test_the_adapter_is_a_function_of_the_seed(make_model: MakeModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    name = f"base_model.model.{HEAD.replace('ff_out', 'blocks.0.q_proj')}.lora_A.default.weight"
    first, second, other = (lora(make_model(), seed=s).state_dict()[name] for s in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("trainable", [False, True])
def test_saved_adapters_load_here_and_in_peft(
    make_model: MakeModel, input_ids: torch.Tensor, tmp_path: Path, trainable: bool
) -> None:
    adapted = disturb(lora(make_model(), target_modules=["q_proj", "ff_out"])).eval()
    expected = logits(adapted, input_ids)
    assert not torch.allclose(expected, logits(make_model(), input_ids), atol=1e-2)
    adapted.save_pretrained(tmp_path)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    loaded = load_adapter(make_model(), tmp_path, trainable=trainable)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(loaded.eval(), input_ids), expected)
    flags = {n: p.requires_grad for n, p in loaded.named_parameters()}
    assert all(flag == (trainable and ".lora_" in name) for name, flag in flags.items())

    plain = PeftModel.from_pretrained(make_model(), str(tmp_path)).eval()
    assert torch.equal(logits(plain, input_ids), expected)


@pytest.mark.parametrize("trainable", [False, True])
def test_reference_mode_is_the_base_model(
    make_model: MakeModel, input_ids: torch.Tensor, tmp_path: Path, trainable: bool
) -> None:
    base = logits(make_model(), input_ids)
    disturb(lora(make_model())).save_pretrained(tmp_path)
    model = load_adapter(make_model(), tmp_path, trainable=trainable)
    adapted = logits(model, input_ids)
    flags = [p.requires_grad for p in model.parameters()]
    with reference_mode(model):
        assert torch.equal(logits(model, input_ids), base)
    assert torch.equal(logits(model, input_ids), adapted)
    with pytest.raises(RuntimeError, match="inside"), reference_mode(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model, input_ids), adapted)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(TypeError, match="LLaDAForMaskedLM"), reference_mode(make_model()):
        pass


def write_official_adapter(folder: Path, *, head: bool) -> dict[str, torch.Tensor]:
    """An adapter as PEFT writes it for the official model, targets given by suffix."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct",
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "r": 4,
        "target_modules": list(PROJECTIONS),
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {name: (32, 32) for name in PROJECTIONS[:4]}  # (out, in)
    shapes |= {"ff_proj": (48, 32), "up_proj": (48, 32), "ff_out": (32, 48)}
    modules = {m: shapes[m.rsplit(".", 1)[-1]] for m in sorted(BLOCK_MODULES)}
    if head:
        modules[HEAD] = (64, 32)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for module, (rows, columns) in modules.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / 4
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("head", [False, True])
def test_official_adapters(
    make_model: MakeModel, input_ids: torch.Tensor, tmp_path: Path, head: bool
) -> None:
    tensors = write_official_adapter(tmp_path / "in", head=head)
    model = load_adapter(make_model(), tmp_path / "in").eval()
    assert adapted_modules(model) == BLOCK_MODULES | ({HEAD} if head else set())

    merged = make_model()
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        delta = tensors[key.replace("lora_A", "lora_B")] @ tensors[key] * 2  # alpha / rank
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        merged.get_submodule(name).weight.data += delta
    expected = logits(merged, input_ids)
    torch.testing.assert_close(logits(model, input_ids), expected, rtol=1e-4, atol=1e-3)

    model.save_pretrained(tmp_path / "out", save_embedding_layers=False)  # no hub look-up
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("kind", ["missing", "unknown", "mis-shaped"])
def test_adapters_that_do_not_fit_are_refused(
    make_model: MakeModel, input_ids: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    tensors = write_official_adapter(tmp_path, head=False)
    name = "base_model.model.model.transformer.blocks.1.k_proj.lora_A.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "unknown":
        name = name.replace("blocks.1", "blocks.9")
        tensors[name] = torch.zeros(4, 32)
    else:
        tensors[name] = torch.zeros(4, 16)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = make_model()
    expected = logits(model, input_ids)
    with pytest.raises(ValueError, match=f"{kind} {name}"):
        load_adapter(model, tmp_path)
    assert not any("lora" in key for key in model.state_dict())
    assert torch.equal(logits(model, input_ids), expected)


def test_what_is_no_lora_adapter_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_config"):
        load_adapter(make_model(), tmp_path)
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected LoRA"):
        load_adapter(make_model(), tmp_path)


def test_checkpointing_under_an_adapter_in_evaluation_mode(
    make_model: MakeModel, input_ids: torch.Tensor
) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        base = make_model()
        if checkpointing:
            base.checkpoint_activations()
        model = disturb(lora(base)).eval()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert len(expected) == 2 * len(BLOCK_MODULES) and actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
