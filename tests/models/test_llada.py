"""The LLaDA model against Llama, against itself in other arrangements, and its errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from egspo.models import LLaDAConfig, LLaDAForMaskedLM
from egspo.models.attention import apply_rope, rope_tables
from egspo.models.llada.modeling import LLaDABlock
from egspo.models.transformer import RMSNorm

MakeModel = Callable[..., LLaDAForMaskedLM]
IMPLEMENTATIONS = ("sdpa", "eager")
LLAMA_NAMES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "model.transformer.blocks": "model.layers",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def as_llama(model: LLaDAForMaskedLM) -> LlamaForCausalLM:
    """Hugging Face's Llama with the weights of ``model``."""
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.embedding_size,
            hidden_size=config.d_model,
            intermediate_size=config.mlp_hidden_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.weight_tying,
        )
    ).eval()
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in LLAMA_NAMES.items():
            key = key.replace(ours, theirs)
        state[key] = value
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.weight_tying else set())
    return llama


def randomise_norms(model: LLaDAForMaskedLM) -> LLaDAForMaskedLM:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 2}, {"weight_tying": True}], ids=str)
def test_equals_llama_without_its_causal_mask(
    make_model: MakeModel, input_ids: torch.Tensor, fields: dict[str, Any], implementation: str
) -> None:
    model = randomise_norms(make_model(attn_implementation=implementation, **fields))
    length = input_ids.shape[1]
    open_mask = torch.zeros(len(input_ids), 1, length, length)
    with torch.no_grad():
        expected = as_llama(model)(input_ids, attention_mask=open_mask).logits
        actual = model(input_ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_four_dimensional_causal_mask_gives_llama(
    make_model: MakeModel, input_ids: torch.Tensor, implementation: str, dtype: torch.dtype
) -> None:
    model = make_model(attn_implementation=implementation)
    length = input_ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    if dtype == torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    with torch.no_grad():
        expected = as_llama(model)(input_ids).logits
        actual = model(input_ids, attention_mask=mask).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_every_position_sees_every_other(make_model: MakeModel, input_ids: torch.Tensor) -> None:
    model = make_model()
    changed = input_ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 60
    with torch.no_grad():
        difference = (model(input_ids).logits - model(changed).logits).abs().amax(dim=(0, 2))
    assert (difference > 1e-3).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(
    make_model: MakeModel, side: str, n_kv_heads: int, implementation: str
) -> None:
    model = make_model(attn_implementation=implementation, n_kv_heads=n_kv_heads)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 60, (n,), generator=generator) for n in (3, 7, 10)]
    width = 12
    batch = torch.full((3, width), 1)
    mask = torch.zeros(3, width, dtype=torch.long)
    spans = [slice(width - len(r), width) if side == "left" else slice(0, len(r)) for r in rows]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        batch[i, span], mask[i, span] = row, 1
    with torch.no_grad():
        padded = model(batch, attention_mask=mask).logits
        for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
            alone = model(row[None]).logits[0]
            torch.testing.assert_close(padded[i, span], alone, rtol=0, atol=1e-5)
    assert padded.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mask_of_ones_is_no_mask(
    make_model: MakeModel, input_ids: torch.Tensor, implementation: str
) -> None:
    model = make_model(attn_implementation=implementation)
    with torch.no_grad():
        expected = model(input_ids).logits
        for ones in (torch.ones_like(input_ids), torch.ones_like(input_ids, dtype=torch.bool)):
            assert torch.equal(model(input_ids, attention_mask=ones).logits, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["padding", "bool", "float", "minus infinity"])
def test_a_row_of_padding_is_finite_and_harmless(
    make_model: MakeModel, input_ids: torch.Tensor, implementation: str, kind: str
) -> None:
    model = make_model(attn_implementation=implementation)
    keep = torch.ones_like(input_ids, dtype=torch.bool)
    keep[1] = False
    mask = keep if kind == "padding" else keep[:, None, None].expand(-1, 1, 11, 11)
    if kind in ("float", "minus infinity"):
        closed = torch.finfo(torch.float32).min if kind == "float" else float("-inf")
        mask = torch.zeros(mask.shape).masked_fill(~mask, closed)
    output = model(input_ids, attention_mask=mask)
    with torch.no_grad():
        unmasked = model(input_ids).logits
    torch.testing.assert_close(output.logits[[0, 2]], unmasked[[0, 2]], rtol=0, atol=1e-5)
    # A float mask costs its row the precision of what is added to the scores.
    tolerance = 1e-5 if kind in ("padding", "bool") else 0.2
    torch.testing.assert_close(output.logits[1], unmasked[1], rtol=0, atol=tolerance)
    output.logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_eager_equals_sdpa_and_gives_attentions(
    make_model: MakeModel, input_ids: torch.Tensor
) -> None:
    sdpa = make_model(n_kv_heads=2)
    eager = make_model(n_kv_heads=2, attn_implementation="eager")
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = sdpa(input_ids, attention_mask=mask).logits
        output = eager(input_ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    assert [tuple(a.shape) for a in output.attentions] == [(3, 4, 11, 11)] * 2
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 11))
        assert (weights[0, :, :, :4] == 0).all()
    with pytest.raises(ValueError, match="eager"):
        sdpa(input_ids, output_attentions=True)


def test_hidden_states_end_with_the_normed_one(
    make_model: MakeModel, input_ids: torch.Tensor
) -> None:
    model = make_model()
    with torch.no_grad():
        output = model(input_ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(input_ids))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert model(input_ids).hidden_states is None


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_the_head_on_the_hidden_states(
    make_model: MakeModel, input_ids: torch.Tensor, tied: bool
) -> None:
    model = make_model(weight_tying=tied)
    head = model.get_output_embeddings()
    assert (head is model.get_input_embeddings()) == tied
    assert ("model.transformer.ff_out.weight" in model.state_dict()) != tied
    with torch.no_grad():
        full = model(input_ids)
        trunk = model(input_ids, compute_logits=False)
        assert trunk.logits is None
        assert torch.equal(trunk.last_hidden_state, full.last_hidden_state)
        assert torch.equal(F.linear(trunk.last_hidden_state, head.weight), full.logits)
    assert full.logits.shape == (3, 11, 64)  # embedding_size, more than vocab_size


def test_loss_is_unshifted_and_ignores_minus_100(
    make_model: MakeModel, input_ids: torch.Tensor
) -> None:
    model = make_model()
    labels = input_ids.clone()
    labels[:, ::2] = -100
    with torch.no_grad():
        output = model(input_ids, labels=labels)
    log_probs = output.logits.log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
    torch.testing.assert_close(output.loss, -log_probs[:, 1::2].mean())
    with pytest.raises(ValueError, match="compute_logits"):
        model(input_ids, labels=labels, compute_logits=False)


def test_inputs_embeds_and_tuples(make_model: MakeModel, input_ids: torch.Tensor) -> None:
    model = make_model()
    with torch.no_grad():
        expected = model(input_ids)
        embedded = model(inputs_embeds=model.get_input_embeddings()(input_ids))
        assert torch.equal(embedded.logits, expected.logits)
        logits, hidden = model(input_ids, return_dict=False)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(hidden, expected.last_hidden_state)


def gradients(model: LLaDAForMaskedLM, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    mask = torch.ones_like(input_ids)
    mask[0, -2:] = 0
    model(input_ids, attention_mask=mask, labels=input_ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(
    make_model: MakeModel,
    input_ids: torch.Tensor,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(residual_dropout=0.1, attention_dropout=0.1).train(training)
    expected = gradients(model, input_ids)
    assert len(expected) == len(list(model.parameters()))

    runs = 0
    compute = LLaDABlock._compute

    def counted(self: LLaDABlock, *args: Any) -> Any:
        nonlocal runs
        runs += 1
        return compute(self, *args)

    monkeypatch.setattr(LLaDABlock, "_compute", counted)
    model.checkpoint_activations()
    actual = gradients(model, input_ids)
    assert runs == 2 * model.config.n_layers  # forward, and once more in the backward pass
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

    runs = 0
    with torch.no_grad():
        model(input_ids)
    assert runs == model.config.n_layers
    model.gradient_checkpointing_disable()
    runs = 0
    gradients(model, input_ids)
    assert runs == model.config.n_layers


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("field", ["attention_dropout", "residual_dropout", "embedding_dropout"])
def test_dropout_acts_in_training_mode_only(
    make_model: MakeModel, input_ids: torch.Tensor, field: str, implementation: str
) -> None:
    plain = make_model(attn_implementation=implementation)
    model = make_model(attn_implementation=implementation, **{field: 0.5})
    with torch.no_grad():
        expected = plain(input_ids).logits
        assert torch.equal(model(input_ids).logits, expected)
        assert (model.train()(input_ids).logits - expected).abs().max() > 1e-2


def test_rope_tables_are_float32_at_any_model_dtype(
    make_model: MakeModel, input_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = torch.tensor([[0, 1, 37, 4095]])
    config = LLaDAConfig()
    exact = positions[0, :, None] * 500000.0 ** -(torch.arange(64, dtype=torch.float64) / 64)
    for table, expected in zip(
        rope_tables(config, positions), (exact.cos(), exact.sin()), strict=True
    ):
        assert table.dtype == torch.float32 and table.shape == (1, 1, 4, 128)
        torch.testing.assert_close(
            table[0, 0].double(), torch.cat((expected, expected), -1), rtol=0, atol=1e-3
        )

    seen: list[torch.dtype] = []

    def spy(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        seen.extend((cos.dtype, sin.dtype))
        return apply_rope(x, cos, sin)

    monkeypatch.setattr("egspo.models.attention.apply_rope", spy)
    model = make_model().to(torch.bfloat16)
    assert not list(model.buffers())  # nothing for .to() to round
    with torch.no_grad():
        output = model(input_ids)
    assert set(seen) == {torch.float32}
    assert output.logits.dtype == torch.bfloat16


def test_bfloat16_norm_rounds_before_the_scale() -> None:
    norm = RMSNorm(256, 1e-5).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(64, 256, generator=generator).to(torch.bfloat16)
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    expected = norm.weight * (x.float() * scale).to(torch.bfloat16)
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_weights_and_autocast_stay_near_float32(
    make_model: MakeModel, input_ids: torch.Tensor, implementation: str
) -> None:
    model = make_model(attn_implementation=implementation)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    kinds = (mask, mask[:, None, None].expand(-1, 1, 11, 11).bool())
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask).logits
        for kind in kinds:
            with torch.autocast("cpu", torch.bfloat16):
                autocast = model(input_ids, attention_mask=kind).logits
            torch.testing.assert_close(autocast.float(), expected, rtol=0.1, atol=0.3)
        half = model.to(torch.bfloat16)(input_ids, attention_mask=mask)
    torch.testing.assert_close(half.logits.float(), expected, rtol=0.1, atol=0.3)


def test_a_float_mask_survives_autocast(make_model: MakeModel, input_ids: torch.Tensor) -> None:
    mask = torch.full((3, 1, 11, 11), torch.finfo(torch.float32).min)
    for implementation in IMPLEMENTATIONS:
        model = make_model(attn_implementation=implementation)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(input_ids, attention_mask=mask).logits.isfinite().all()


def test_bad_inputs_name_themselves(make_model: MakeModel, input_ids: torch.Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="65 tokens exceed max_sequence_length 64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    for mask in (torch.ones(3, 10), torch.ones(2, 11), torch.ones(3, 11, 11)):
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(input_ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"bool or floating point, got torch\.int64"):
        model(input_ids, attention_mask=torch.ones(3, 1, 11, 11, dtype=torch.long))
    with pytest.raises(TypeError, match="past_key_values"):
        model(input_ids, past_key_values=None)


def test_biases(make_model: MakeModel) -> None:
    def biased(**fields: Any) -> set[str]:
        names = make_model(**fields).state_dict()
        return {n.split(".")[-2] for n in names if n.endswith(".bias")}

    assert biased() == set()
    assert biased(include_qkv_bias=True) == {"q_proj", "k_proj", "v_proj"}
    model = make_model(include_bias=True)
    assert "model.transformer.ff_out.bias" in model.state_dict()
    assert biased(include_bias=True) >= {"q_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(make_model: MakeModel, input_ids: torch.Tensor, tied: bool) -> None:
    model = make_model(weight_tying=tied)
    with torch.no_grad():
        before = model(input_ids).logits
        model.resize_token_embeddings(80)
        after = model(input_ids).logits
    assert model.config.vocab_size == model.config.embedding_size == 80
    # A product of another shape.
    torch.testing.assert_close(after[..., :64], before)
    assert after.shape[-1] == 80


def test_config_speaks_both_vocabularies() -> None:
    config = LLaDAConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, n_layers=3)
    assert (config.d_model, config.n_heads, config.n_kv_heads) == (64, 8, 2)
    assert (config.num_hidden_layers, config.head_dim) == (3, 8)
    default = LLaDAConfig()
    assert (default.n_kv_heads, default.embedding_size, default.head_dim) == (32, 126464, 128)
    assert LLaDAConfig(d_model=64, n_heads=8, mlp_hidden_size=None).mlp_hidden_size == 256


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("activation_type", "swiglu"),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("bias_for_layer_norm", True),
        ("attention_layer_norm", True),
        ("alibi", True),
        ("rope", False),
        ("rope_full_precision", False),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("multi_query_attention", True),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("n_heads", 3),
        ("n_kv_heads", 5),
        ("d_model", 0),
        ("embedding_size", 10),
        ("residual_dropout", 1.0),
    ],
)
def test_config_refuses_what_it_cannot_honour(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        LLaDAConfig(**{field: value})


def test_config_checks_mapped_names_too() -> None:
    with pytest.raises(ValueError, match="activation_type"):
        LLaDAConfig(hidden_act="gelu")
    with pytest.raises(ValueError, match="bias_for_layer_norm"):
        LLaDAConfig(include_bias=True, bias_for_layer_norm=None)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_padding_on_a_gpu(make_model: MakeModel, implementation: str) -> None:
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    config = {"d_model": 128, "n_kv_heads": 2}
    reference = make_model(attn_implementation="eager", **config).cuda()
    model = make_model(**config).to("cuda", torch.bfloat16)
    model.set_attn_implementation(implementation)
    ids = torch.randint(0, 60, (3, 11), generator=torch.Generator().manual_seed(5)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, -3:] = 0, 0
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask).last_hidden_state
        actual = model(ids, attention_mask=mask).last_hidden_state
    kept = mask.bool()
    torch.testing.assert_close(actual[kept].float(), expected[kept], rtol=0.1, atol=0.2)
