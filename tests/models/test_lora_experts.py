"""Adapters on routed experts: stacked in memory, in files as PEFT has those on linear modules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from egspo.models import add_lora, load_adapter, reference_mode
from egspo.models.experts import Experts
from egspo.models.lora import add_reference_adapter, save_adapter
from egspo.models.lora_experts import LoraExperts
from egspo.models.transformer import GatedMLP
from egspo.rollouts.work import ModelCost, Work
from tests.families import disturb, make

FAMILIES = ("sdar_moe", "llada2")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERT = re.compile(r"layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj")


class Separate(nn.ModuleList):
    """Experts whose projections are linear modules."""

    def __init__(self, experts: Experts) -> None:
        count, width, hidden = experts.down_proj.shape
        super().__init__(GatedMLP(width, hidden) for _ in range(count))
        for number, expert in enumerate(self):
            gate, up = experts.gate_up_proj[number].detach().chunk(2)
            for linear, weight in (
                (expert.gate_proj, gate),
                (expert.up_proj, up),
                (expert.down_proj, experts.down_proj[number].detach()),
            ):
                linear.weight.data.copy_(weight)  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        one_hot = F.one_hot(index, len(self)).to(x.dtype) * weight[:, :, None]
        every = torch.stack([expert(x) for expert in self], dim=1)
        return (one_hot.sum(1)[:, :, None] * every).sum(1)


def separated(family: str, **fields: Any) -> Any:
    """The model of :func:`make` for PEFT alone, which knows nothing of it."""
    model = make(family, **fields)
    for module in model.modules():
        if isinstance(getattr(module, "experts", None), Experts):
            module.experts = Separate(module.experts)
    model.config.model_type = "unknown"
    return model


def adapted(family: str, rank: int = 2, **options: Any) -> Any:
    model = make(family, max_position_embeddings=256)
    given = {"rank": rank, "alpha": 6, "dropout": 0.0, "seed": 0, "experts": True, **options}
    return add_lora(model, **given)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(6, 60, (3, 11), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_changes_nothing_until_it_is_trained(family: str, ids: Tensor) -> None:
    expected = logits(make(family), ids)
    model = adapted(family)
    assert torch.equal(logits(model, ids), expected)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    layers = 2  # of three in LLaDA2, the first being dense
    assert sum(".experts.lora_" in name for name in trained) == layers * 2 * 3
    disturb(model)
    moved = logits(model, ids)
    assert float((moved - expected).abs().max()) > 0.1
    with reference_mode(model):
        assert torch.equal(logits(model, ids), expected)
    add_reference_adapter(model)
    with reference_mode(model, "reference"):
        assert torch.equal(logits(model, ids), moved)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_products_and_merged_weights_give_the_same(
    family: str, rank: int, ids: Tensor
) -> None:
    model = disturb(adapted(family, rank))
    expected = logits(model, ids)
    model.get_base_model().set_experts_implementation("grouped_mm")
    close(logits(model, ids), expected)
    model.get_base_model().set_experts_implementation("eager")
    model.merge_adapter()
    close(logits(model, ids), expected)
    model.unmerge_adapter()
    close(logits(model, ids), expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged.model.layers[-1].mlp.experts, Experts)
    close(logits(merged, ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_those_of_peft_on_linear_experts(
    family: str, ids: Tensor, tmp_path: Path
) -> None:
    """Read by PEFT, and gradients there the same."""
    model = disturb(adapted(family))
    save_adapter(model, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / WEIGHTS)
    name = "base_model.model.model.layers.1.mlp.experts.7.down_proj"
    assert tensors[f"{name}.lora_A.weight"].shape == (2, 16)
    assert tensors[f"{name}.lora_B.weight"].shape == (32, 2)
    theirs: Any = PeftModel.from_pretrained(
        separated(family), tmp_path / "ours", is_trainable=True
    ).eval()
    close(logits(theirs, ids), logits(model, ids))
    gradients = []
    for one in (model, theirs):
        one(input_ids=ids).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    for number in (0, 7):
        for factor in "AB":
            key = f"base_model.model.model.layers.1.mlp.experts.{number}.up_proj.lora_{factor}"
            stacked = f"base_model.model.model.layers.1.mlp.experts.lora_{factor}.default.up_proj"
            close(gradients[0][stacked][number], gradients[1][f"{key}.default.weight"])
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_file(tmp_path / "theirs" / WEIGHTS)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_peft_is_read_and_written_unchanged(
    family: str, ids: Tensor, tmp_path: Path
) -> None:
    targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
    targets += ["query_key_value"] if family == "llada2" else []
    targets = targets if family == "sdar_moe" else targets[:3] + targets[4:]
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=targets)
    theirs = disturb(get_peft_model(separated(family), config).eval())  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(make(family), tmp_path / "theirs", trainable=True)
    close(logits(model, ids), logits(theirs, ids))
    save_adapter(model, tmp_path / "ours")
    tensors, again = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    back: Any = PeftModel.from_pretrained(separated(family), tmp_path / "ours").eval()
    assert torch.equal(logits(back, ids), logits(theirs, ids))
    close(logits(load_adapter(make(family), tmp_path / "ours"), ids), logits(theirs, ids))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="experts is of models with routed experts"):
        add_lora(make("sdar"), rank=2, alpha=2, dropout=0.0, experts=True, seed=0)
    save_adapter(adapted("llada2"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    one = next(name for name in tensors if EXPERT.search(name))
    for left in (
        {name: tensor for name, tensor in tensors.items() if name != one},
        {name: tensor for name, tensor in tensors.items() if not EXPERT.search(name)},
        {**tensors, one: torch.ones(3, 3)},
    ):
        save_file(left, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"does not fit|experts have factors"):
            load_adapter(make("llada2"), tmp_path)
    last = {name: tensor for name, tensor in tensors.items() if ".experts.7." not in name}
    save_file(last, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj \[7, 2, 16\], expected \[8, 2, 16\]"):
        load_adapter(make("llada2"), tmp_path)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    settings = json.loads((tmp_path / CONFIG).read_text())
    for change, message in (
        ({"use_dora": True}, "adapters on routed experts are plain"),
        # What PEFT would apply to experts that are linear modules.
        (
            {"alpha_pattern": {r"experts\.3\.up_proj": 4}},
            r"alpha_pattern has .*experts\.3\.up_proj",
        ),
        ({"rank_pattern": {"up_proj": 2}}, "rank_pattern has 'up_proj', which names"),
        (
            {"layers_to_transform": [1], "target_modules": ["up_proj"]},
            r"layers_to_transform is \[1\]",
        ),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            load_adapter(make("llada2"), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**settings, "alpha_pattern": {"dense": 4}}))
    load_adapter(make("llada2"), tmp_path)


def test_experts_that_an_adapter_excludes_are_left_alone(tmp_path: Path) -> None:
    save_adapter(adapted("llada2"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    others = {name: tensor for name, tensor in tensors.items() if not EXPERT.search(name)}
    save_file(others, tmp_path / WEIGHTS, metadata={"format": "pt"})
    settings = json.loads((tmp_path / CONFIG).read_text())
    settings["exclude_modules"] = r".*\.experts\..*"
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    model = load_adapter(make("llada2"), tmp_path)
    assert not any(isinstance(module, LoraExperts) for module in model.modules())


def test_flops_of_adapters_are_counted(ids: Tensor) -> None:
    """Of the experts that tokens go through."""
    model = adapted("sdar_moe")
    model.set_attn_implementation("eager")  # torch does not count the fused one of CPUs
    cost = ModelCost.of(model)
    assert cost is not None
    work = Work()
    work.add(*ids.shape, ids.shape[1])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, compute_logits=False)
    assert counter.get_total_flops() == cost.forward(work)
