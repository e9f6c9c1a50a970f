"""Checkpoints and tokenizers of SDAR and LLaDA2 in the official layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from egspo.models import (
    LLaDA2ForMaskedLM,
    SDARForMaskedLM,
    SDARMoeForMaskedLM,
    load_config,
    load_model,
    model_on_meta,
)
from egspo.training.state import load_weights, save_weights
from tests import official
from tests.families import BLOCK_CAUSAL, FAMILIES, make
from tests.models.test_dream_checkpoint import assert_same, read_tensors, write_tensors

CLASSES = {"sdar": SDARForMaskedLM, "sdar_moe": SDARMoeForMaskedLM, "llada2": LLaDA2ForMaskedLM}
# What published configurations say beside the sizes.
ARCHITECTURES = {
    "sdar": ("SDARForCausalLM", {"attn_implementation": "flex_attention", "ep_size": 1}),
    "sdar_moe": ("SDARMoeForCausalLM", {"router_aux_loss_coef": 0.001, "mlp_only_layers": []}),
    "llada2": ("LLaDA2MoeModelLM", {"max_window_layers": 28, "router_dtype": "fp32"}),
}


def layout(c: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official tensors, written out from the published layout."""
    width, dim = c.hidden_size, c.head_dim
    heads, kv = c.num_attention_heads * dim, c.num_key_value_heads * dim
    llada2 = c.model_type == "llada2_moe"

    def gated(at: str, hidden: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{at}gate_proj.weight": (hidden, width),
            f"{at}up_proj.weight": (hidden, width),
            f"{at}down_proj.weight": (width, hidden),
        }

    names: dict[str, tuple[int, ...]] = {
        f"model.{'word_embeddings' if llada2 else 'embed_tokens'}.weight": (c.vocab_size, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (c.vocab_size, width),
    }
    for n in range(c.num_hidden_layers):
        at = f"model.layers.{n}."
        names |= {at + f"{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        if llada2:
            names[at + "attention.query_key_value.weight"] = (heads + 2 * kv, width)
            names[at + "attention.dense.weight"] = (width, heads)
            names |= {at + f"attention.{k}_layernorm.weight": (dim,) for k in ("query", "key")}
        else:
            names[at + "self_attn.q_proj.weight"] = (heads, width)
            names |= {at + f"self_attn.{k}_proj.weight": (kv, width) for k in "kv"}
            names[at + "self_attn.o_proj.weight"] = (width, heads)
            names |= {at + f"self_attn.{k}_norm.weight": (dim,) for k in "qk"}
        if c.model_type == "sdar" or (llada2 and n < c.first_k_dense_replace):
            names |= gated(at + "mlp.", c.intermediate_size)
            continue
        for e in range(c.num_experts):
            names |= gated(f"{at}mlp.experts.{e}.", c.moe_intermediate_size)
        names[at + "mlp.gate.weight"] = (c.num_experts, width)
        if llada2:
            names[at + "mlp.gate.expert_bias"] = (c.num_experts,)
            shared = c.num_shared_experts * c.moe_intermediate_size
            names |= gated(at + "mlp.shared_experts.", shared)
    return names


def write_checkpoint(
    folder: Path, family: str, *, shards: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """An official-looking checkpoint of random weights; returns its tensors."""
    name, more = ARCHITECTURES[family]
    fields = {**FAMILIES[family], "architectures": [name], "torch_dtype": "bfloat16", **more}
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in layout(load_config(folder)).items():
        tensor = torch.randn(shape, generator=generator)
        tensors[key] = tensor if key.endswith("expert_bias") else tensor.to(dtype)
    write_tensors(folder, tensors, shards)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_official_checkpoints_round_trip(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    tensors = write_checkpoint(tmp_path / "in", family, shards=3, dtype=dtype)
    model = load_model(tmp_path / "in", dtype=dtype)
    assert type(model) is CLASSES[family] and not model.training
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same(read_tensors(tmp_path / "out"), tensors)
    again = load_model(tmp_path / "out", dtype=dtype)
    assert_same(again.state_dict(), dict(model.state_dict()))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == FAMILIES[family]["model_type"]
    assert written["block_size"] == 4


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_checkpoints_of_a_run_are_official_too(tmp_path: Path, family: str) -> None:
    model = make(family, seed=1)
    save_weights(model, tmp_path)
    names = {
        k
        for k in layout(model.config)
        if k != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    (saved,) = {p.parent for p in tmp_path.rglob("*.safetensors")}
    assert set(read_tensors(saved)) == names
    other = make(family, seed=2)
    load_weights(other, tmp_path)
    assert_same(other.state_dict(), dict(model.state_dict()))


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_auto_classes_need_no_remote_code(tmp_path: Path, family: str) -> None:
    tensors = write_checkpoint(tmp_path, family)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CLASSES[family].config_class
    for auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
        model = auto.from_pretrained(tmp_path, dtype=torch.float32)
        assert type(model) is CLASSES[family]
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    trunk = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(
        {f"model.{k}": v for k, v in trunk.state_dict().items()},
        {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"},
    )


def test_the_recipe_chooses_the_attention_and_not_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "sdar")
    assert load_model(tmp_path).config._attn_implementation == "sdpa"
    eager = load_model(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("sdar", "model.layers.1.self_attn.q_norm.weight", "1 missing"),
        ("sdar_moe", "model.layers.0.mlp.gate.weight", "1 missing"),
        ("sdar_moe", "model.layers.0.mlp.experts.3.up_proj.weight", "cannot be stacked"),
        ("sdar_moe", "model.layers.0.mlp.experts.7.down_proj.weight", "1 mis-shaped.*down_proj"),
        ("llada2", "model.layers.1.mlp.gate.expert_bias", "1 missing"),
        ("llada2", "model.layers.2.mlp.shared_experts.up_proj.weight", "1 missing"),
    ],
)
def test_checkpoints_that_lack_a_tensor_are_refused(
    tmp_path: Path, family: str, name: str, message: str
) -> None:
    tensors = write_checkpoint(tmp_path, family)
    del tensors[name]
    write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match=f"does not fit {CLASSES[family].__name__}; .*{message}"):
        load_model(tmp_path)


PUBLISHED = {
    "SDAR-8B-Chat": (8_190_735_360, 399),
    "SDAR-30B-A3B-Chat": (30_532_122_624, 18_867),
    "LLaDA2.0-mini": (16_255_643_392, 14_813),
    "LLaDA2.1-mini": (16_255_643_392, 14_813),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_index_has_these_tensors(name: str) -> None:
    weight_map, size = official.index_of(name)
    config = load_config(official.folder(name))
    shapes = layout(config)
    count, tensors = PUBLISHED[name]
    assert set(shapes) == set(weight_map) and len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    biases = sum(s[0] for n, s in shapes.items() if n.endswith("expert_bias"))
    # In bfloat16, but that LLaDA2.1 keeps the biases in float32.
    assert size == 2 * count + (2 * biases if name == "LLaDA2.1-mini" else 0)
    model = model_on_meta(config)
    held = sum(tensor.numel() for tensor in model.state_dict().values())
    assert held == count


def test_the_published_configurations_load() -> None:
    expected = {
        "SDAR-1dot7B-Chat": (4, 151669, 151643),
        "SDAR-8B-Chat": (4, 151669, 151643),
        "SDAR-30B-A3B-Chat": (4, 151669, 151643),  # which names neither
        "LLaDA2.0-mini": (32, 156895, 156892),
        "LLaDA2.1-mini": (32, 156895, 156892),
    }
    for name, fields in expected.items():
        config = load_config(official.folder(name))
        assert (config.block_size, config.mask_token_id, config.eos_token_id) == fields
