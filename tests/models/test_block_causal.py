"""Block-causal models against transformers and against an implementation in plain operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from transformers import (
    DeepseekV3Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from egspo.models import LLaDA2Config, SDARConfig, add_lora
from egspo.models.blocks import Columns, dense_mask, flex_mask
from egspo.models.experts import Experts, GroupedRouter, Router, stacked
from tests.families import BLOCK_CAUSAL, FAMILIES, make

IMPLEMENTATIONS = ("sdpa", "eager")
BLOCK = 4


@pytest.fixture
def input_ids() -> Tensor:
    """Two whole blocks and a part of a third."""
    return torch.randint(0, 60, (3, 11), generator=torch.Generator().manual_seed(0))


def visible(length: int, block: int = BLOCK) -> Tensor:
    """bool [N, N] by the definition."""
    return torch.tensor([[k // block <= q // block for k in range(length)] for q in range(length)])


def as_qwen3(model: Any) -> Any:
    """Hugging Face's Qwen3 or Qwen3-MoE with the weights of ``model``, by the same names."""
    config = model.config
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"]
    names += ["num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"]
    kinds: tuple[Any, Any] = (Qwen3Config, Qwen3ForCausalLM)
    if config.model_type == "sdar_moe":
        names += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
        kinds = (Qwen3MoeConfig, Qwen3MoeForCausalLM)
    fields = {name: getattr(config, name) for name in names}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    qwen = kinds[1](kinds[0](**fields, rope_parameters=rope)).eval()
    missing, unexpected = qwen.load_state_dict(model.state_dict(), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not unexpected and set(missing) <= tied
    return qwen


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("sdar", {}),
        ("sdar", {"block_size": 5, "num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("sdar_moe", {}),
        ("sdar_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    ],
    ids=str,
)
def test_equals_qwen3_with_a_block_causal_mask(
    input_ids: Tensor, family: str, fields: dict[str, Any], implementation: str
) -> None:
    model = make(family, attn_implementation=implementation, **fields)
    mask = visible(input_ids.shape[1], model.config.block_size)
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = as_qwen3(model)(
            input_ids,
            attention_mask=added.expand(3, 1, -1, -1),
            position_ids=torch.arange(input_ids.shape[1])[None],
            use_cache=False,
        ).logits
        actual = model(input_ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def plain_llada2(model: Any, ids: Tensor) -> Tensor:
    """Logits [B, N, V] of LLaDA2 by its definition, token by token and expert by expert."""
    config, weights = model.config, dict(model.state_dict())
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    batch, length = ids.shape
    seen = visible(length, config.block_size)

    def norm(x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * weights[name]

    def rotated(x: Tensor) -> Tensor:
        """Complex numbers of the dimensions i and i + d / 2 of the first d, turned."""
        d = int(dim * config.partial_rotary_factor)
        turns = torch.arange(length)[:, None] * config.rope_theta ** -(torch.arange(0, d, 2) / d)
        pairs = torch.complex(x[..., : d // 2], x[..., d // 2 : d])
        pairs = pairs * torch.polar(torch.ones_like(turns), turns)
        return torch.cat((pairs.real, pairs.imag, x[..., d:]), dim=-1)

    def attention(x: Tensor, at: str) -> Tensor:
        fused = x @ weights[at + "query_key_value.weight"].T
        q = fused[..., : heads * dim].view(batch, length, heads, dim).transpose(1, 2)
        k, v = (
            fused[..., first : first + kv * dim].view(batch, length, kv, dim).transpose(1, 2)
            for first in (heads * dim, (heads + kv) * dim)
        )
        q = rotated(norm(q, at + "query_layernorm.weight"))
        k = rotated(norm(k, at + "key_layernorm.weight"))
        outputs = []
        for head in range(heads):
            shared = head // (heads // kv)
            scores = q[:, head] @ k[:, shared].transpose(1, 2) / dim**0.5
            outputs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, shared])
        return torch.cat(outputs, dim=-1) @ weights[at + "dense.weight"].T

    def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def names(at: str) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (weights[f"{at}{n}_proj.weight"] for n in ("gate", "up", "down"))
        return gate, up, down

    def experts(x: Tensor, at: str) -> Tensor:
        scores = (x @ weights[at + "gate.weight"].T).sigmoid()
        choice = scores + weights[at + "gate.expert_bias"]
        size, result = (
            config.num_experts // config.n_group,
            gated(x, *names(at + "shared_experts.")),
        )
        for b in range(batch):
            for n in range(length):
                mine = choice[b, n].tolist()
                value = [
                    sum(sorted(mine[g * size : g * size + size])[-2:])
                    for g in range(config.n_group)
                ]
                kept = sorted(range(config.n_group), key=lambda g: -value[g])[: config.topk_group]
                allowed = [e for e in range(config.num_experts) if e // size in kept]
                chosen = sorted(allowed, key=lambda e: -mine[e])[: config.num_experts_per_tok]
                total = sum(scores[b, n, e] for e in chosen)
                for e in chosen:
                    gate, up = weights[at + "experts.gate_up_proj"][e].chunk(2)
                    down = weights[at + "experts.down_proj"][e]
                    share = config.routed_scaling_factor * scores[b, n, e] / total
                    result[b, n] += share * gated(x[b, n], gate, up, down)
        return result

    x = weights["model.word_embeddings.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        x = x + attention(norm(x, at + "input_layernorm.weight"), at + "attention.")
        y = norm(x, at + "post_attention_layernorm.weight")
        dense = layer < config.first_k_dense_replace
        x = x + (gated(y, *names(at + "mlp.")) if dense else experts(y, at + "mlp."))
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fields", [{}, {"partial_rotary_factor": 1.0, "num_shared_experts": 2}])
def test_llada2_equals_its_definition(
    input_ids: Tensor, fields: dict[str, Any], implementation: str
) -> None:
    model = make("llada2", attn_implementation=implementation, **fields)
    with torch.no_grad():
        expected = plain_llada2(model, input_ids)
        actual = model(input_ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)  # sums in another order


def test_the_grouped_router_is_deepseek_v3s() -> None:
    config = LLaDA2Config(
        hidden_size=32, num_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4
    )
    generator = torch.Generator().manual_seed(0)
    mine = GroupedRouter(config)
    mine.weight.data.normal_(generator=generator)
    mine.expert_bias.uniform_(-0.5, 0.5, generator=generator)
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=32,
            n_routed_experts=16,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
    )
    theirs.weight.data.copy_(mine.weight)
    theirs.e_score_correction_bias.copy_(mine.expert_bias)
    x = torch.randn(200, 32, generator=generator)
    index, weight = mine(x)
    _, expected, chosen = theirs(x)
    dense = torch.zeros(200, 16).scatter(1, index, weight)
    torch.testing.assert_close(dense, torch.zeros(200, 16).scatter(1, chosen, expected))
    unbiased = torch.zeros_like(mine.expert_bias)
    mine.expert_bias.copy_(unbiased)
    assert not torch.equal(mine(x)[0].sort(1).values, index.sort(1).values)


def test_routers_are_float32_in_any_precision() -> None:
    config = LLaDA2Config(hidden_size=32, num_experts=16, n_group=4, topk_group=2)
    router = GroupedRouter(config)
    generator = torch.Generator().manual_seed(0)
    router.weight.data.normal_(generator=generator)
    x = torch.randn(500, 32, generator=generator).bfloat16()
    router.weight.data = router.weight.data.bfloat16()
    index, weight = router(x)
    wide = router.weight.data.float() @ x.float().T
    assert weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = router(x)
    assert torch.equal(again, index)
    router.weight.data = router.weight.data.float()
    assert torch.equal(router(x.float())[0], index)
    assert wide.isfinite().all()


@pytest.mark.parametrize("family", ["sdar_moe", "llada2"])
def test_expert_implementations_agree(input_ids: Tensor, family: str) -> None:
    model = make(family)
    assert model.config._experts_implementation is None
    gradients = []
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="experts_implementation must be one of"):
        model.set_experts_implementation("batched_mm")


def test_experts_that_nobody_goes_to() -> None:
    config = make("sdar_moe").config
    experts = Experts(config)
    torch.nn.init.normal_(experts.gate_up_proj)
    torch.nn.init.normal_(experts.down_proj)
    x = torch.randn(5, 32)
    index = torch.tensor([[7, 0]]).expand(5, -1)
    result = experts(x, index, torch.tensor([[0.25, 0.75]]).expand(5, -1))
    expected = torch.zeros(5, 32)
    for e, share in ((7, 0.25), (0, 0.75)):
        gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, -1)
        expected += share * (F.silu(gate) * up) @ experts.down_proj[e].T
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


# --- Padding, passes over some columns, copies


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_memory_attends_as_it_is_told(family: str) -> None:
    for implementation in ("eager", "sdpa"):
        model = make(family, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_padding_counts_for_nothing(family: str, side: str, implementation: str) -> None:
    model = make(family, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 60, (n,), generator=generator) for n in (3, 7, 10)]
    batch, keep = torch.full((3, 12), 1), torch.zeros(3, 12, dtype=torch.long)
    spans = [slice(12 - len(r), 12) if side == "left" else slice(0, len(r)) for r in rows]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        batch[i, span], keep[i, span] = row, 1
    with torch.no_grad():
        padded = model(batch, attention_mask=keep).logits
        assert padded.isfinite().all()
        for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
            alone = model(row[None]).logits[0]
            torch.testing.assert_close(padded[i, span], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_later_blocks_need_not_exist(input_ids: Tensor, family: str) -> None:
    model = make(family)
    with torch.no_grad():
        whole = model(input_ids).logits[:, : 2 * BLOCK]
        torch.testing.assert_close(model(input_ids[:, : 2 * BLOCK]).logits, whole)
        part = model(input_ids[:, : BLOCK + 1]).logits
    assert (part[:, BLOCK] - whole[:, BLOCK]).abs().max() > 1e-3  # of its own block it needs all


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_the_cache_of_finished_blocks_is_exact(
    input_ids: Tensor, family: str, implementation: str, padded: bool
) -> None:
    model = make(family, attn_implementation=implementation)
    mask = torch.ones_like(input_ids)
    if padded:
        mask[0, :3] = 0
    columns = torch.arange(7, 11) if padded else torch.arange(4, 8)
    columns = columns.expand(3, -1)
    changed = input_ids.clone()
    changed[:, columns[0]] = (changed[:, columns[0]] + 7) % 60
    with torch.no_grad():
        cache = model(input_ids, attention_mask=mask, return_cache=True).cache
        block = model(
            changed.gather(1, columns), attention_mask=mask, cache=cache, columns=columns
        ).last_hidden_state
        full = model(changed, attention_mask=mask).last_hidden_state
    rows = slice(0, 1) if padded else slice(None)  # where the columns are a block
    expected = full[:, columns[0]]
    torch.testing.assert_close(block[rows], expected[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_copies_see_the_blocks_before_them_and_themselves(
    input_ids: Tensor, family: str, implementation: str
) -> None:
    """Each copy is what a pass over the sequence up to it, with its tokens, gives."""
    model = make(family, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(3)
    copies = [1, 2, 1]  # blocks; the third is not whole
    tokens = [torch.randint(0, 60, (3, 3 if b == 2 else 4), generator=generator) for b in copies]
    ids, positions, streams = [input_ids], [torch.arange(11)], [torch.zeros(11, dtype=torch.long)]
    for number, (block, canvas) in enumerate(zip(copies, tokens, strict=True)):
        ids.append(canvas)
        positions.append(torch.arange(block * BLOCK, block * BLOCK + canvas.shape[1]))
        streams.append(torch.full((canvas.shape[1],), number + 1))
    with torch.no_grad():
        together = model(
            torch.cat(ids, 1),
            position_ids=torch.cat(positions)[None],
            streams=torch.cat(streams).expand(3, -1),
        ).last_hidden_state
        clean = model(input_ids).last_hidden_state
        torch.testing.assert_close(together[:, :11], clean, rtol=0, atol=1e-5)
        first = 11
        for block, canvas in zip(copies, tokens, strict=True):
            alone = model(torch.cat((input_ids[:, : block * BLOCK], canvas), 1)).last_hidden_state
            mine = together[:, first : first + canvas.shape[1]]
            torch.testing.assert_close(mine, alone[:, block * BLOCK :], rtol=0, atol=1e-5)
            first += canvas.shape[1]


def columns_of_a_pass() -> Columns:
    generator = torch.Generator().manual_seed(4)
    block = torch.randint(0, 4, (2, 150), generator=generator)
    stream = torch.randint(0, 3, (2, 150), generator=generator)
    return Columns(block, stream, torch.rand(2, 150, generator=generator) < 0.8)


def test_the_block_mask_of_flex_attention_is_the_dense_mask() -> None:
    columns = columns_of_a_pass()
    mask = flex_mask(columns, columns)
    whole = create_mask(mask.mask_mod, 2, 1, 150, 150, device="cpu")
    assert torch.equal(whole, dense_mask(columns, columns))
    clean = Columns(columns.block)
    whole = create_mask(flex_mask(clean, clean).mask_mod, 2, 1, 150, 150, device="cpu")
    assert torch.equal(whole, dense_mask(clean, clean))
    some = torch.arange(40, 110).expand(2, -1)
    mask = flex_mask(columns.take(some), columns)
    whole = create_mask(mask.mask_mod, 2, 1, 70, 150, device="cpu")
    assert torch.equal(whole, dense_mask(columns, columns)[:, :, 40:110])


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_flex_attention_gives_the_same(input_ids: Tensor, family: str) -> None:
    torch.compiler.reset()
    positions = torch.arange(11)[None]
    streams = torch.tensor([0] * 7 + [1] * 4).expand(3, -1)
    outputs = []
    for implementation in ("sdpa", "flex_attention"):
        model = make(family, attn_implementation=implementation)
        with torch.no_grad():
            plain = model(input_ids, return_cache=True)
            copies = model(input_ids, position_ids=positions, streams=streams)
            columns = torch.arange(4, 8).expand(3, -1)
            cached = model(input_ids[:, 4:8], cache=plain.cache, columns=columns)
            torch.compiler.reset()  # on a CPU, torch 2.13 has a fault in kernels of any size
            behind = model(
                input_ids[:, 4:],
                cache=plain.cache,
                columns=torch.arange(4, 11).expand(3, -1),
                position_ids=positions.expand(3, -1),
                streams=streams,
            )
            torch.testing.assert_close(
                behind.last_hidden_state, copies.last_hidden_state[:, 4:], rtol=0, atol=1e-5
            )
        outputs.append([o.last_hidden_state for o in (plain, copies, cached, behind)])
    for actual, expected in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_misuse_is_refused(input_ids: Tensor) -> None:
    model = make("sdar")
    streams = torch.zeros_like(input_ids)
    with pytest.raises(ValueError, match="streams need"):
        model(input_ids, streams=streams)
    with pytest.raises(ValueError, match="streams need"):
        make("llada")(input_ids, streams=streams, position_ids=torch.arange(11)[None])
    with pytest.raises(ValueError, match=r"attention_mask must be \[3, 11\]"):
        model(input_ids, attention_mask=torch.ones(3, 12))
    with pytest.raises(ValueError, match="exceed max_sequence_length 64"):
        model(torch.zeros(1, 65, dtype=torch.long))


# --- Configurations


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (SDARConfig, {"attention_bias": True}, "attention_bias must be False"),
        (SDARConfig, {"block_size": 0}, "block_size must be an integer >= 1"),
        (SDARConfig, {"head_dim": 5}, "head_dim must be even"),
        (SDARConfig, {"use_sliding_window": True}, "use_sliding_window must be False"),
        (LLaDA2Config, {"score_function": "softmax"}, "score_function must be 'sigmoid'"),
        (LLaDA2Config, {"use_qk_norm": False}, "use_qk_norm must be True"),
        (LLaDA2Config, {"n_group": 3}, "n_group must divide num_experts=256"),
        (LLaDA2Config, {"topk_group": 9}, "topk_group must be <= n_group=8"),
        (LLaDA2Config, {"num_experts_per_tok": 129}, "num_experts_per_tok must be <= 128"),
        (LLaDA2Config, {"rotary_dim": 32}, "rotary_dim must be .* = 64, got 32"),
        (LLaDA2Config, {"partial_rotary_factor": 0.0}, "partial_rotary_factor must rotate"),
        (
            LLaDA2Config,
            {"first_k_dense_replace": 21},
            r"first_k_dense_replace must be in \[0, 20\]",
        ),
    ],
)
def test_configurations_refuse_what_they_cannot_honour(
    config: Callable[..., Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


# --- Training


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_gradient_checkpointing(input_ids: Tensor, family: str) -> None:
    model = make(family)
    expected = gradients(model, input_ids)
    assert len(expected) == len(list(model.parameters()))  # experts and routers are in it
    model.gradient_checkpointing_enable()
    actual = gradients(model, input_ids)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


TARGETS = {
    "sdar": {f"self_attn.{n}_proj" for n in "qkvo"}
    | {f"mlp.{n}_proj" for n in ("gate", "up", "down")},
    "sdar_moe": {f"self_attn.{n}_proj" for n in "qkvo"},
    "llada2": {"attention.query_key_value", "attention.dense"}
    | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    | {f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")},
}


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_adapters_are_on_attention_dense_and_shared_projections(
    input_ids: Tensor, family: str
) -> None:
    base = make(family)
    with torch.no_grad():
        expected = base(input_ids).logits
    model = add_lora(base, rank=4, alpha=8, dropout=0.1, seed=0).eval()
    adapted = {n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {name.split(".", 3)[3] for name in adapted} == TARGETS[family]
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, expected)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_stacking_says_which_expert_is_not_whole() -> None:
    tensors = {
        f"m.mlp.experts.{n}.{p}_proj.weight": torch.ones(2, 2)
        for n in (0, 1)
        for p in ("gate", "up", "down")
    }
    assert stacked(tensors)["m.mlp.experts.gate_up_proj"].shape == (2, 4, 2)
    del tensors["m.mlp.experts.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"m\.mlp\.experts\.1 lacks \['up'\]"):
        stacked(tensors)


def test_routers_are_never_adapted() -> None:
    routers = [n for n, m in make("llada2").named_modules() if isinstance(m, Router)]
    assert routers == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    with pytest.raises(ValueError, match="names no projection of a block"):
        add_lora(make("llada2"), rank=2, alpha=2, dropout=0.0, target_modules=["mlp.gate"], seed=0)


@pytest.mark.parametrize("target", ["experts", "mlp.experts.gate_up_proj", "experts.3.down_proj"])
def test_routed_experts_are_adapted_together(target: str) -> None:
    with pytest.raises(ValueError, match="adapted together by experts: true"):
        add_lora(make("llada2"), rank=2, alpha=2, dropout=0.0, target_modules=[target], seed=0)
    shared = ["shared_experts.up_proj"]
    adapted = add_lora(make("llada2"), rank=2, alpha=2, dropout=0.0, target_modules=shared, seed=0)
    assert sum(hasattr(module, "lora_A") for module in adapted.modules()) == 2
