"""The memory estimate against what autograd really keeps, and against sizes written out."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from egspo.config import OptimizerConfig
from egspo.engines.fsdp import ShardedModel
from egspo.engines.optimization import build_optimizer
from egspo.engines.processes import Processes, process_state
from egspo.models import add_lora, new_config, new_model
from egspo.models.loading import model_on_meta
from egspo.planning.memory import Sizes, estimate_memory
from egspo.planning.memory_items import MemoryItem, peak_bytes
from egspo.planning.memory_sharded import sharded_weights
from tests.helpers import runs
from tests.helpers.runs import config

TOKENS = (2, 64)
MODELS: dict[str, dict[str, Any]] = {
    "llada": {"d_model": 128, "n_heads": 4, "mlp_hidden_size": 320},
    "Dream": {
        "model_type": "Dream",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 320,
    },
}


def build(kind: str, layers: int, dtype: torch.dtype, lora: bool) -> Any:
    depth = "n_layers" if kind == "llada" else "num_hidden_layers"
    fields = {**MODELS[kind], depth: layers, "vocab_size": 64, "mask_token_id": 5}
    model = new_model({**fields, "eos_token_id": 1, "pad_token_id": 1}, seed=0).to(dtype).eval()
    return add_lora(model, rank=8, alpha=8, dropout=0.05, seed=0).eval() if lora else model


def kept_by_autograd(model: Any) -> int:
    """Bytes of the tensors that the backward pass of a bfloat16 autocast forward waits for."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(TOKENS, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(input_ids=ids, compute_logits=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(
    kind: str, dtype: torch.dtype, lora: bool, checkpointing: bool
) -> None:
    models = [build(kind, layers, dtype, lora) for layers in (2, 3)]
    for model in models:
        if checkpointing:
            model.checkpoint_activations()
    a_layer = kept_by_autograd(models[1]) - kept_by_autograd(models[0])
    sizes = Sizes.of(models[1], compute=2)
    tokens = TOKENS[0] * TOKENS[1]
    if checkpointing:
        assert a_layer == tokens * sizes.width * sizes.weight
        return
    expected = tokens * sizes.saved_per_token() + sizes.cast_bytes(sizes.layers) // sizes.layers
    assert a_layer == pytest.approx(expected, rel=0.01)


@functools.cache
def described(model_type: str, lora: bool, experts: bool = False) -> Any:
    """A model of the published size, with adapters of rank 8 or without."""
    model: Any = model_on_meta(new_config({"model_type": model_type})).to(torch.bfloat16)
    with torch.device("meta"):
        if not lora:
            return model
        return add_lora(model, rank=8, alpha=8, dropout=0.0, experts=experts, seed=0)


def estimate(folder: Path, model_type: str = "llada", **changes: Any) -> dict[str, MemoryItem]:
    """With adapters of rank 8, 8 states and 32 sequences of 200 + 256 tokens."""
    lora = {"rank": 8, "alpha": 8, "dropout": 0.0}
    tree: dict[str, Any] = {
        "model": {"config": None, "path": "some/model", "lora": lora},
        "generation": {"max_new_tokens": 256, "steps": 128, "block_length": 32, "batch_size": 32},
        "algorithm": {"selected_steps": 8, "group_size": 8},
        "prompts_per_step": 8,
        "micro_batch_size": 8,
    }
    run = config(folder, tree, changes)
    on_experts = run.model.lora is not None and run.model.lora.experts
    model = described(model_type, run.model.lora is not None, on_experts)
    return {item.name: item for item in estimate_memory(run, model, 200)}


def test_weights_adapters_and_optimizer(tmp_path: Path) -> None:
    parts = estimate(tmp_path)
    adapters = 8 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 12288))
    assert parts["frozen weights"].bytes == 2 * 8_015_581_184
    assert parts["adapters"].bytes == 4 * adapters  # PEFT keeps them in float32
    assert parts["optimizer"].bytes == 8 * adapters
    assert parts["gradients"].bytes == 4 * adapters
    assert parts["weights in bfloat16"].bytes == 2 * adapters
    assert "reference policy" not in parts

    parts = estimate(tmp_path, model={"lora": None}, algorithm={"beta": 0.04})
    assert parts["weights"].bytes == parts["reference policy"].bytes == 2 * 8_015_581_184
    assert "frozen weights" not in parts and "adapters" not in parts
    parts = estimate(tmp_path, model={"lora": None})
    assert "reference policy" not in parts


def test_adapters_on_routed_experts(tmp_path: Path) -> None:
    """LLaDA2.0-mini: 256 experts of width 512 in 19 layers of width 2048."""
    changes: dict[str, Any] = {"micro_batch_size": 8}
    without, whole = (
        estimate(tmp_path, "llada2_moe", **changes, model={"lora": {"experts": experts}})
        for experts in (False, True)
    )
    factors = 8 * 3 * (2048 + 512) * 256 * 19
    for name, bytes_each in (("adapters", 4), ("gradients", 4), ("optimizer", 8)):
        assert whole[name].bytes - without[name].bytes == bytes_each * factors
    # Of a token eight experts keep what goes in, and what is between the factors.
    kept = 8 * (2 * 2048 + 512 + 3 * 8) * 2
    tokens = whole["activations"].bytes // 20
    assert tokens - without["activations"].bytes // 20 == kept * (200 + 256 + 8 * 32)


def test_checkpointing_and_its_alternative(tmp_path: Path) -> None:
    without = estimate(tmp_path)
    with_it = estimate(tmp_path, model={"gradient_checkpointing": True})
    tokens, inputs = 8 * 456, 32 * 4096 * 2
    assert without["activations"].bytes == with_it["activations without checkpointing"].bytes
    assert with_it["activations"].bytes == without["activations with checkpointing"].bytes
    a_layer = without["activations"].bytes // 32
    assert with_it["activations"].bytes == tokens * inputs + a_layer
    # RMSNorm inputs, queries to attention's output, gates, and the adapters' own inputs.
    kept = 2 * 4096 * 4 + 4 * 4096 * 2 + 3 * 12288 * 2 + (6 * 4096 + 12288 + 7 * 8) * 2
    assert a_layer == tokens * kept


def test_shared_prompts_let_more_trajectories_attend_to_them(tmp_path: Path) -> None:
    """A limit on columns has room for eight of them, the longest having 488 columns."""
    limit: dict[str, Any] = {"generation": {"block_length": 4}, "micro_batch_size": None}
    limit["micro_batch_tokens"] = 200 + 8 * 288
    parts = estimate(tmp_path, "sdar", **limit)
    name = "keys and values of shared prompts"
    assert parts[name].bytes == 8 * 200 * 36 * 2 * 1024 * 2
    one = estimate(tmp_path, "sdar", **limit, model={"gradient_checkpointing": True})
    assert one[name].bytes * 36 == parts[name].bytes
    never = estimate(tmp_path, "sdar", **limit, algorithm={"share_prompts": "never"})
    assert name not in never
    assert never["activations"].bytes == parts["activations"].bytes  # of so many columns
    assert name not in estimate(tmp_path, "sdar", generation={"block_length": 4})


def test_rollout_caches_and_guidance(tmp_path: Path) -> None:
    plain = estimate(tmp_path)
    assert plain["rollout logits"].bytes == 32 * 32 * 126464 * 2
    assert "block cache" not in plain
    cached = estimate(tmp_path, generation={"cache": "dual"})
    assert cached["block cache"].bytes == 32 * 456 * 2 * 32 * 4096 * 2
    assert cached["activations"].bytes / plain["activations"].bytes == (456 + 32) / 456
    prefix = estimate(tmp_path, generation={"cache": "prefix"})
    assert prefix["activations"].bytes / plain["activations"].bytes == (456 + 256) / 456
    guided = estimate(tmp_path, generation={"guidance": 1.0})
    assert guided["activations"].bytes == 2 * plain["activations"].bytes
    assert guided["rollout activations"].bytes == 2 * plain["rollout activations"].bytes
    assert guided["rollout logits"].bytes == plain["rollout logits"].bytes

    dream = estimate(tmp_path, "Dream", generation={"cache": "dual"})
    assert dream["block cache"].bytes == 32 * 456 * 2 * 28 * (4 * 128) * 2


def test_the_peak_is_the_larger_phase(tmp_path: Path) -> None:
    parts = estimate(tmp_path)
    items = list(parts.values())
    held = sum(item.bytes for item in items if item.phase == "always")
    update = sum(item.bytes for item in items if item.phase == "update")
    assert peak_bytes(items) == held + update
    large = replace(parts["rollout logits"], bytes=10 * update)
    others = [item for item in items if item.name != "rollout logits"]
    rollout = parts["rollout activations"].bytes
    assert peak_bytes([*others, large]) == held + rollout + 10 * update


def sizes_of_a_rank(rank: int, port: int, lora: bool, found: Any) -> None:
    """Bytes of the parts of weights and moments, and of the whole weights, of one of two."""
    runs._become_rank(rank, 2, port)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    process_state()
    model = build("llada", 2, torch.float32, lora)
    engine = ShardedModel(
        model,
        lambda model: build_optimizer(model, OptimizerConfig()),
        Processes(),
        device_type="cpu",
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    engine.step()
    parts = sum(p.to_local().nbytes for p in model.parameters())
    moments = sum(
        value.to_local().nbytes
        for state in engine.optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    with engine.gathered():
        whole = sum(p.nbytes for p in model.parameters())
    found.put((parts, moments, whole))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_parts_of_a_sharded_model_take_what_is_estimated(lora: bool, tmp_path: Path) -> None:
    context = runs.forkserver()
    found, port = context.Queue(), runs.free_port()
    processes = [
        context.Process(target=sizes_of_a_rank, args=(rank, port, lora, found)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    measured = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    changes: dict[str, Any] = {"distributed": {"engine": "fsdp2"}}
    if lora:
        changes["model"] = {"lora": {"rank": 8}}
    recipe = config(tmp_path, changes)
    items = {
        (item.name, item.phase): item.bytes
        for item in sharded_weights(recipe, build("llada", 2, torch.float32, lora), 2)
    }
    parts, moments = items["weights", "always"], items["optimizer", "always"]
    # Rows are divided: of an odd number one process has one more.
    for part, moment, whole in measured:
        assert part == pytest.approx(parts, rel=0.02)
        assert moment == pytest.approx(moments, rel=0.02)
        assert whole == pytest.approx(parts + items["gathered weights", "rollout"], rel=1e-6)
