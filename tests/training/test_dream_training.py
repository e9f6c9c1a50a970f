"""Dream through the whole program: training a new model and a checkpoint, and decoding after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.helpers.runs as runs
from egspo.cli import main
from egspo.config.recipe import save_config
from egspo.models import DreamForMaskedLM, load_adapter, load_model, new_model
from egspo.models.tokenization import character_tokenizer
from egspo.rollouts.decoder import Decoder
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import PromptBatch
from egspo.runs.metrics import read_metrics
from egspo.tasks import Reward
from egspo.training.trainer import train
from tests.helpers.runs import LETTERS, config

DREAM: dict[str, Any] = {
    "model_type": "Dream",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EGSPO_CACHE", str(tmp_path / "cache"))
    runs.rewards[:] = [Reward("ones", runs.ones)]
    yield
    runs.rewards.clear()


def checkpoint(folder: Path) -> Path:
    """A tiny Dream with its tokenizer, as a user has it on disk."""
    tokenizer = character_tokenizer()
    tokens = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("mask", "eos", "pad")}
    new_model({**DREAM, **tokens, "vocab_size": len(tokenizer)}, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(run: Path, updated: int) -> None:
    records = read_metrics(run)
    assert len(records) == 1 + 4
    drifts = [record["ratio/drift"] for record in records if "ratio/drift" in record]
    assert len(drifts) == updated and max(drifts) < 1e-4  # rounding


def test_a_new_model(tmp_path: Path) -> None:
    """Full fine-tuning with a reference, and supervised before it."""
    change = {
        "model": {"config": DREAM, "gradient_checkpointing": True},
        "algorithm": {"beta": 0.04},
        "sft": {"steps": 2, "batch_size": 4},
    }
    final = train(config(tmp_path / "run", {"model": None}, LETTERS, change))
    check(tmp_path / "run", updated=4)
    model = load_model(final / "model")
    assert isinstance(model, DreamForMaskedLM)
    assert model.config.mask_token_id == character_tokenizer().mask_token_id


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_cache(tmp_path: Path, cache: str) -> None:
    """Rollout, replay and update agree on the column before the block."""
    change = {"model": {"config": DREAM}, "generation": {"cache": cache}}
    train(config(tmp_path / "run", {"model": None}, LETTERS, change))
    check(tmp_path / "run", updated=4)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_the_first_step_of_a_cached_block_is_full_attention(tmp_path: Path, cache: str) -> None:
    """At the canvas that its cache was made from, a block has the rows of full attention."""
    model = load_model(checkpoint(tmp_path / "dream"), dtype=torch.float32)
    denoiser = Denoiser(model, mask_id=2, eos_id=1, pad_id=0)
    prompts = PromptBatch.from_lists([[7, 8, 9], [9]], pad_id=0)
    canvas = torch.tensor([[8, 7, 8, 9, 2, 2, 2, 2], [7, 9, 9, 8, 2, 2, 2, 2]])
    start = torch.tensor([4, 4])
    windows = []
    with torch.no_grad():
        for kind in ("none", cache):
            decoder = Decoder(denoiser, 4, kind)
            context = decoder.begin_block(prompts, canvas, start, earliest=0, padded=True)
            window = decoder.window(context, canvas)
            sequence, position = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.arange(4, 8)
            windows.append(window.rows(sequence, position.repeat(2)))
    torch.testing.assert_close(windows[1], windows[0], rtol=0, atol=1e-5)


def test_a_checkpoint_with_an_adapter_by_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path / "dream")
    lora = {"path": str(path), "lora": {"rank": 2, "alpha": 4, "dropout": 0.0}}
    recipe = tmp_path / "recipe.yaml"
    changes = ({"model": None}, LETTERS, {"model": lora, "algorithm": {"beta": 0.04}})
    save_config(config(tmp_path / "run", *changes), recipe)
    assert main(["train", str(recipe)]) == 0
    check(tmp_path / "run", updated=4)
    adapted = load_adapter(load_model(path), tmp_path / "run" / "final" / "adapter")
    names = {n for n, p in adapted.named_parameters() if "lora_B" in n and p.abs().max() > 0}
    assert len(names) == 7

    capsys.readouterr()
    command = ["generate", "--model", str(path), "--adapter", str(tmp_path / "run")]
    assert main([*command, "--prompt", "12", "--temperature", "0"]) == 0
    assert set(capsys.readouterr().out) <= set("01234\n")


def test_the_head_reads_the_row_to_the_left(tmp_path: Path) -> None:
    """A model whose rows are their own tokens predicts the token before."""
    path = checkpoint(tmp_path / "dream")
    model = load_model(path, dtype=torch.float32)
    vocabulary = model.config.vocab_size
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()  # the residual stream alone
        basis = torch.eye(vocabulary, 16)
        model.model.embed_tokens.weight.copy_(basis)
        model.lm_head.weight.copy_(10 * basis)
        ids = torch.tensor([[7, 8, 9, 7, 10]])
        predicted = model(ids).logits.argmax(-1)
    assert predicted.tolist() == [[7, 7, 8, 9, 7]]


def test_a_new_dream_names_its_own_fields(tmp_path: Path) -> None:
    change = {"model": {"config": {**DREAM, "n_layers": 2}}}
    with pytest.raises(ValueError, match=r"unknown fields for a new Dream model: \['n_layers'\]"):
        train(config(tmp_path / "run", {"model": None}, LETTERS, change))
    other = {"model": {"config": {**DREAM, "model_type": "gpt2"}}}
    with pytest.raises(ValueError, match=r"model_type \['Dream', 'llada', .*\], got 'gpt2'"):
        train(config(tmp_path / "run", {"model": None}, LETTERS, other))


def test_prompts_must_fit_dreams_context(tmp_path: Path) -> None:
    change = {"model": {"config": {**DREAM, "max_position_embeddings": 8}}}
    with pytest.raises(ValueError, match="do not fit the model's context of 8"):
        train(config(tmp_path / "run", {"model": None}, LETTERS, change))
