"""Dream against Qwen2 with its mask open and its rows moved, and against itself in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from egspo.models import DreamConfig, DreamForMaskedLM, add_lora, new_model, reference_mode
from egspo.models.dream.modeling import DreamDecoderLayer
from egspo.models.transformer import RMSNorm

MakeModel = Callable[..., DreamForMaskedLM]
IMPLEMENTATIONS = ("sdpa", "eager")
TINY: dict[str, Any] = {
    "model_type": "Dream",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "mask_token_id": 5,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def make_dream(seed: int = 0, attn_implementation: str = "sdpa", **fields: Any) -> DreamForMaskedLM:
    """A tiny model in evaluation mode, with norms and biases that count."""
    model = new_model({**TINY, **fields}, seed=seed).eval()
    assert isinstance(model, DreamForMaskedLM)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(std=0.2, generator=generator)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
    model.set_attn_implementation(attn_implementation)
    return model


def as_qwen2(model: DreamForMaskedLM) -> Qwen2ForCausalLM:
    """Hugging Face's Qwen2 with the weights of ``model``, by the same names."""
    config = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    qwen = Qwen2ForCausalLM(
        Qwen2Config(
            **{name: getattr(config, name) for name in names},
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).eval()
    missing, unexpected = qwen.load_state_dict(model.state_dict(), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not unexpected and set(missing) <= tied
    return qwen


def open_logits(model: DreamForMaskedLM, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Qwen2's logits [B, S, V] where every token attends to all that ``keep`` [B, S] keeps."""
    closed = torch.finfo(torch.float32).min
    mask = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    mask = mask.masked_fill(~keep[:, None, None, :], closed)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    logits: torch.Tensor = as_qwen2(model)(
        ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    return logits


def moved(rows: torch.Tensor) -> torch.Tensor:
    """Row ``i - 1`` at place ``i``, the first in its own."""
    return rows[:, [0, *range(rows.shape[1] - 1)]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "fields", [{}, {"num_key_value_heads": None}, {"tie_word_embeddings": True}], ids=str
)
def test_equals_qwen2_without_its_causal_mask_and_rows_moved(
    input_ids: torch.Tensor, fields: dict[str, Any], implementation: str
) -> None:
    model = make_dream(attn_implementation=implementation, **fields)
    with torch.no_grad():
        unmoved = open_logits(model, input_ids, torch.ones_like(input_ids, dtype=torch.bool))
        actual = model(input_ids).logits
    assert unmoved.std() > 0.5
    assert (unmoved - moved(unmoved)).abs().max() > 0.5
    torch.testing.assert_close(actual, moved(unmoved), rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, implementation: str) -> None:
    """Against Qwen2 with the same padding, and against each row alone."""
    model = make_dream(attn_implementation=implementation)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 60, (n,), generator=generator) for n in (3, 7, 10)]
    batch, keep = torch.full((3, 12), 1), torch.zeros(3, 12, dtype=torch.bool)
    spans = [slice(12 - len(r), 12) if side == "left" else slice(0, len(r)) for r in rows]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        batch[i, span], keep[i, span] = row, True
    with torch.no_grad():
        padded = model(batch, attention_mask=keep.long()).logits
        qwen = moved(open_logits(model, batch, keep))
        assert padded.isfinite().all()
        for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
            # The first token's own row is to the left of it, in the padding.
            inner = slice(span.start + 1, span.stop)
            torch.testing.assert_close(padded[i, inner], qwen[i, inner], rtol=0, atol=1e-5)
            alone = model(row[None]).logits[0, 1:]
            torch.testing.assert_close(padded[i, inner], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_gives_the_logits_of_a_position_from_its_row(
    input_ids: torch.Tensor, tied: bool
) -> None:
    model = make_dream(tie_word_embeddings=tied)
    head = model.get_output_embeddings()
    assert (head is model.get_input_embeddings()) == tied
    assert ("lm_head.weight" in model.state_dict()) != tied
    with torch.no_grad():
        full = model(input_ids, output_hidden_states=True)
        trunk = model(input_ids, compute_logits=False)
        unmoved = model.model(input_ids).last_hidden_state
    assert trunk.logits is None
    assert torch.equal(trunk.last_hidden_state, full.last_hidden_state)
    assert torch.equal(F.linear(trunk.last_hidden_state, head.weight), full.logits)
    assert torch.equal(full.last_hidden_state, moved(unmoved))
    assert torch.equal(full.hidden_states[-1], unmoved)


def test_a_token_is_not_predicted_from_itself(input_ids: torch.Tensor) -> None:
    """The loss asks row i - 1 about token i, so its labels are not shifted by the caller."""
    model = make_dream()
    labels = input_ids.clone()
    labels[:, 0] = -100
    with torch.no_grad():
        loss = model(input_ids, labels=labels).loss
        keep = torch.ones_like(input_ids, dtype=torch.bool)
        log_probs = open_logits(model, input_ids, keep)[:, :-1].log_softmax(-1)
    picked = log_probs.gather(-1, input_ids[:, 1:, None])
    torch.testing.assert_close(loss, -picked.mean())


# --- Passes over some of the columns


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_cached_pass_with_the_column_before_gives_the_rows_of_a_block(
    input_ids: torch.Tensor, padded: bool, implementation: str
) -> None:
    model = make_dream(attn_implementation=implementation)
    start, end = 4, 9
    mask = torch.ones_like(input_ids)
    if padded:
        mask[0, :3] = 0
    with torch.no_grad():
        full = model(input_ids, attention_mask=mask, return_cache=True)
        first = start - model.config.prediction_shift
        columns = torch.arange(first, end).expand(len(input_ids), -1)
        block = model(
            input_ids[:, first:end], attention_mask=mask, cache=full.cache, columns=columns
        )
    assert first == 3
    torch.testing.assert_close(
        block.last_hidden_state[:, 1:], full.last_hidden_state[:, start:end], rtol=0, atol=1e-5
    )


def test_a_cached_pass_sees_what_changed_in_its_columns_and_keeps_what_is_not_live(
    input_ids: torch.Tensor,
) -> None:
    model = make_dream()
    columns = torch.arange(3, 9).expand(len(input_ids), -1)
    live = torch.ones_like(columns, dtype=torch.bool)
    live[:, 0] = False
    changed = input_ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 60
    with torch.no_grad():
        cache = model(input_ids, return_cache=True).cache
        before = [key.clone() for key in cache.keys]
        block = model(changed[:, 3:9], cache=cache, columns=columns, live=live)
    for old, new in zip(before, cache.keys, strict=True):
        assert torch.equal(new[:, :, :4], old[:, :, :4])  # column 3 was not live
        assert torch.equal(new[:, :, 9:], old[:, :, 9:])
        assert not torch.equal(new[:, :, 5], old[:, :, 5])
    full = model(changed).last_hidden_state
    # What a cache approximates: columns outside the block have not seen the change.
    assert 1e-4 < (block.last_hidden_state[:, 1:] - full[:, 4:9]).abs().max() < 5


# --- Training


def gradients(model: DreamForMaskedLM, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids, labels=input_ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_recomputes_in_evaluation_mode(
    input_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_dream()
    expected = gradients(model, input_ids)
    assert len(expected) == len(list(model.parameters()))
    runs = 0
    compute = DreamDecoderLayer._compute

    def counted(self: DreamDecoderLayer, *args: Any) -> Any:
        nonlocal runs
        runs += 1
        return compute(self, *args)

    monkeypatch.setattr(DreamDecoderLayer, "_compute", counted)
    model.checkpoint_activations()
    actual = gradients(model, input_ids)
    assert runs == 2 * 2  # forward, and once more in the backward pass
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_on_all_projections_and_never_the_head(
    input_ids: torch.Tensor, tied: bool
) -> None:
    base = make_dream(tie_word_embeddings=tied)
    with torch.no_grad():
        expected = base(input_ids).logits
    model = add_lora(base, rank=4, alpha=8, dropout=0.1, seed=0).eval()
    adapted = {n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {f"model.layers.{n}.{name}" for n in range(2) for name in PROJECTIONS}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(input_ids=input_ids).logits - expected).abs().max() > 1e-2
        with reference_mode(model):
            assert torch.equal(model(input_ids=input_ids).logits, expected)
    assert model.config.prediction_shift == 1  # through PEFT's wrapper


def test_adapters_on_chosen_projections() -> None:
    model = add_lora(
        make_dream(), rank=4, alpha=8, dropout=0.0, target_modules=["o_proj", "mlp.up_proj"], seed=0
    )
    adapted = {n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {name.split(".", 3)[3] for name in adapted} == {"self_attn.o_proj", "mlp.up_proj"}
    with pytest.raises(ValueError, match="'attn_out', which names no projection"):
        add_lora(make_dream(), rank=4, alpha=8, dropout=0.0, target_modules=["attn_out"], seed=0)


def test_attention_dropout_acts_in_training_mode_only(input_ids: torch.Tensor) -> None:
    plain, model = make_dream(), make_dream(attention_dropout=0.5)
    with torch.no_grad():
        expected = plain(input_ids).logits
        assert torch.equal(model(input_ids).logits, expected)
        assert (model.train()(input_ids).logits - expected).abs().max() > 1e-2


# --- Configuration and errors


def test_bad_inputs_name_themselves(input_ids: torch.Tensor) -> None:
    model = make_dream()
    with pytest.raises(ValueError, match="65 tokens exceed max_sequence_length 64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="cache and columns belong together"):
        model(input_ids, columns=input_ids)
    with pytest.raises(ValueError, match="labels need compute_logits"):
        model(input_ids, labels=input_ids, compute_logits=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("use_mrope", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("num_attention_heads", 27),
        ("num_key_value_heads", 5),
        ("num_hidden_layers", 0),
        ("attention_dropout", 1.0),
    ],
)
def test_config_refuses_what_it_cannot_honour(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"DreamConfig\..*{field}"):
        DreamConfig(**{field: value})


def test_resized_embeddings(input_ids: torch.Tensor) -> None:
    model = make_dream()
    with torch.no_grad():
        before = model(input_ids).logits
        model.resize_token_embeddings(80)
        after = model(input_ids).logits
    assert model.config.vocab_size == 80
    # A product of another shape.
    torch.testing.assert_close(after[..., :60], before)
    assert after.shape[-1] == 80
