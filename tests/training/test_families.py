"""Every family of models through the whole program: what works for one works for all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tests.helpers.runs as runs
from egspo.cli import main
from egspo.config.recipe import save_config
from egspo.models import load_model, new_model
from egspo.models.experts import Router
from egspo.models.tokenization import character_tokenizer
from egspo.rollouts.causal import CausalDecoder
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import PromptBatch
from egspo.runs.metrics import read_metrics
from egspo.tasks import Reward
from egspo.training.sft import SupervisedData, masking_rates, supervised_loss
from egspo.training.trainer import train
from tests.families import BLOCK_CAUSAL, FAMILIES, make, new_fields
from tests.helpers.runs import LETTERS, config

SLOW = pytest.mark.slow
ONE_OF_EACH = [f if f in ("llada", "llada2") else pytest.param(f, marks=SLOW) for f in FAMILIES]
"""Mask-predictors and block-causal models; the other families in the slow tests."""
SFT = {"sft": {"steps": 6, "batch_size": 4, "log_every": 2}}


@pytest.fixture(autouse=True)
def ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EGSPO_CACHE", str(tmp_path / "cache"))
    runs.rewards[:] = [Reward("ones", runs.ones)]
    yield
    runs.rewards.clear()


def new(family: str) -> dict[str, Any]:
    """Changes to the tiny recipe."""
    return {"model": {"config": new_fields(family)}}


def recipe(family: str, output: Path, *changes: dict[str, Any]) -> Any:
    return config(output, LETTERS, {"model": {"config": None}}, new(family), *changes)


def checkpoint(family: str, folder: Path) -> Path:
    """A tiny model with its tokenizer, as a user has it on disk."""
    tokenizer = character_tokenizer()
    tokens = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("mask", "eos", "pad")}
    model = new_model({**new_fields(family), **tokens, "vocab_size": len(tokenizer)}, seed=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(run: Path) -> None:
    records = read_metrics(run)
    assert len(records) == 1 + 4
    drifts = [record["ratio/drift"] for record in records if record.get("ratio/drift") is not None]
    assert drifts and max(drifts) < runs.DRIFT


@pytest.mark.parametrize(
    "stepwise", [True, pytest.param(False, marks=SLOW)], ids=["egspo-sa", "egspo"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_from_warm_start_to_text(
    family: str, stepwise: bool, tmp_path: Path, no_plots: None, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"algorithm": {"stepwise": stepwise, "beta": 0.04}}
    train(recipe(family, tmp_path / "run", SFT, changes))
    check(tmp_path / "run")
    model = tmp_path / "run" / "final" / "model"
    assert load_model(model).config.model_type == FAMILIES[family]["model_type"]
    capsys.readouterr()
    main(
        [
            "generate",
            "--model",
            str(tmp_path / "run"),
            "--prompt",
            "12",
            "--format",
            "jsonl",
            "--step-map",
        ]
    )
    answer = json.loads(capsys.readouterr().out.splitlines()[0])
    assert answer["index"] == 0 and answer["step_map"]
    main(["inspect", str(tmp_path / "run")])
    assert capsys.readouterr().out


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_an_adapter_on_a_checkpoint_and_its_export(
    family: str, tmp_path: Path, no_plots: None
) -> None:
    base = checkpoint(family, tmp_path / "base")
    changes = {
        "model": {"config": None, "path": str(base), "lora": {"rank": 2, "dropout": 0.0}},
        "algorithm": {"beta": 0.04},
    }
    train(config(tmp_path / "run", LETTERS, changes))
    check(tmp_path / "run")
    main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "merged")])
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    before = load_model(base, dtype=torch.float32)
    moved = {
        name
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name])
    }
    assert moved and not any(
        "gate.weight" in n or "experts." in n.replace("shared_experts.", "") for n in moved
    )


@pytest.mark.parametrize("family", ["sdar_moe", pytest.param("llada2", marks=SLOW)])
def test_an_adapter_on_experts_from_a_run_to_its_export(
    family: str, tmp_path: Path, no_plots: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed on the way, continued by another run, and merged."""
    base = checkpoint(family, tmp_path / "base")
    lora = {"rank": 2, "dropout": 0.0, "experts": True}
    changes = {
        "model": {"config": None, "path": str(base), "lora": lora},
        "algorithm": {"beta": 0.04},
    }
    train(config(tmp_path / "run", LETTERS, changes, {"steps": 2}))
    train(config(tmp_path / "run", LETTERS, changes), resume=tmp_path / "run")
    train(config(tmp_path / "whole", LETTERS, changes))
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "whole")
    check(tmp_path / "run")
    adapter = tmp_path / "run" / "final" / "adapter"
    main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "merged")])
    merged = load_model(tmp_path / "merged", dtype=torch.float32).state_dict()
    before = load_model(base, dtype=torch.float32).state_dict()
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{name}"
        assert not torch.equal(merged[key], before[key])
    file = tmp_path / "again.yaml"
    again = {"model": {"lora": None, "adapter": str(adapter)}, "steps": 1}
    save_config(config(tmp_path / "again", LETTERS, changes, again), file)
    capsys.readouterr()
    main(["train", str(file), "--dry-run"])
    assert "experts" in " ".join(capsys.readouterr().out.split())
    main(["train", str(file)])
    files = [
        load_file(path / "adapter_model.safetensors")
        for path in (adapter, tmp_path / "again" / "final" / "adapter")
    ]
    assert files[0].keys() == files[1].keys()


def test_a_resumed_run_may_share_prompts_or_not(tmp_path: Path, no_plots: None) -> None:
    shared = {"algorithm": {"share_prompts": "always"}}
    train(recipe("sdar", tmp_path / "run", {"steps": 2}, shared))
    train(recipe("sdar", tmp_path / "run"), resume=tmp_path / "run")
    check(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_measures_what_training_did(
    family: str, tmp_path: Path, no_plots: None
) -> None:
    train(recipe(family, tmp_path / "run", {"steps": 2}))
    assert main(["eval", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "eval" / "final" / "summary.json").read_text())
    (row,) = summary["results"]
    last = read_metrics(tmp_path / "run")[-1]
    assert row["rewards"]["ones"] == pytest.approx(last["eval/reward"], abs=1e-12)


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_run_that_is_resumed_ends_as_one_that_was_not(
    family: str, tmp_path: Path, no_plots: None
) -> None:
    train(recipe(family, tmp_path / "whole"))
    train(recipe(family, tmp_path / "parts", {"steps": 2}))
    train(recipe(family, tmp_path / "parts"), resume=tmp_path / "parts")
    assert runs.outcome(tmp_path / "parts") == runs.outcome(tmp_path / "whole")


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_supervised_training_and_what_a_dry_run_says(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    save_config(recipe(family, tmp_path / "sft", SFT), file)
    main(["train", str(file), "--dry-run"])
    assert "failed" not in capsys.readouterr().out
    main(["plan", str(file), "--gpu-memory", "24GB"])
    assert "GiB" in capsys.readouterr().out
    main(["sft", str(file)])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft" / "sft_metrics.jsonl").open()]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_routers_stay_as_they_are_unless_asked_for(
    family: str, tmp_path: Path, no_plots: None
) -> None:
    for trained in (False, True):
        folder = tmp_path / str(trained)
        train(recipe(family, folder, {"steps": 2, "model": {"train_routers": trained}}))
        routers = [
            m for m in load_model(folder / "final" / "model").modules() if isinstance(m, Router)
        ]
        tokenizer = character_tokenizer()
        tokens = {
            f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("mask", "eos", "pad")
        }
        start = new_model({**new_fields(family), **tokens, "vocab_size": len(tokenizer)}, seed=0)
        first = [m for m in start.modules() if isinstance(m, Router)]
        assert len(routers) == len(first) == {"sdar": 0, "sdar_moe": 2, "llada2": 2}[family]
        for mine, theirs in zip(routers, first, strict=True):
            assert torch.equal(mine.weight, theirs.weight) != trained


def test_block_options_are_refused_before_the_warm_start(tmp_path: Path) -> None:
    bad = [
        (
            {"generation": {"block_length": 8}},
            "block_length must be the block size of the model, 4",
        ),
        ({"generation": {"cache": "dual"}}, "cache: dual is of models with full attention"),
        ({"algorithm": {"entropy_over": "masked"}}, "entropy_over: masked needs"),
        (
            {"algorithm": {"objective": "mean_field", "stepwise": False}},
            "objective: mean_field masks whole completions again",
        ),
        ({"algorithm": {"objective": "no.such:Thing"}}, "no.such:Thing"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            train(recipe("sdar", tmp_path / "run", SFT, changes))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    for changes, message in (
        ({"model": {"block_size": 4}}, "model.block_size is of block-causal models"),
        ({"algorithm": {"completion_blocks": "active"}}, "completion_blocks: active is of block"),
    ):
        with pytest.raises(ValueError, match=message):
            train(recipe("llada", tmp_path / "run", SFT, changes))


def test_adapters_on_nothing_are_refused_before_the_warm_start(tmp_path: Path) -> None:
    for lora, message in (
        ({"experts": True}, "experts is of models with routed experts"),
        ({"target_modules": ["up_projection"]}, "'up_projection', which names no projection"),
    ):
        with pytest.raises(ValueError, match=message):
            train(recipe("sdar", tmp_path / "run", SFT, {"model": {"lora": lora}}))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_another_block_size(tmp_path: Path, no_plots: None) -> None:
    changes = {"model": {"block_size": 8}, "generation": {"block_length": 8}}
    train(recipe("sdar", tmp_path / "run", changes))
    check(tmp_path / "run")
    saved = load_model(tmp_path / "run" / "final" / "model")
    assert saved.config.block_size == 8


# --- The supervised loss


def supervised(family: str) -> tuple[Denoiser, SupervisedData]:
    denoiser = Denoiser(make(family).double(), mask_id=5, eos_id=1, pad_id=1)
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randint(6, 60, (n,), generator=generator).tolist() for n in (3, 8, 5)]
    completions = torch.randint(6, 60, (3, 12), generator=generator)
    return denoiser, SupervisedData(PromptBatch.from_lists(lists, 1), completions)


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_the_two_stream_loss_is_that_of_blocks_one_at_a_time(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, data = supervised(family)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    states = CausalDecoder.states

    def spied(
        self: CausalDecoder, prompts: Any, tokens: Any, place: Tensor, start: Tensor, canvas: Tensor
    ) -> Any:
        seen.append((place, start, canvas))
        return states(self, prompts, tokens, place, start, canvas)

    monkeypatch.setattr(CausalDecoder, "states", spied)
    before = denoiser.work.copy()
    loss = supervised_loss(denoiser, data, seed=0, step=1)
    assert (denoiser.work - before).forwards == 1
    ((places, starts, canvases),) = seen
    assert len(places) == 4 + 3 + 4  # of 3, 8 and 5 prompt tokens, in blocks of 4
    rates = masking_rates(0, 1, 3, 4, torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for row, start, noisy in zip(places.tolist(), starts.tolist(), canvases, strict=True):
            prompt = data.prompts.ids[row][data.prompts.mask[row]]
            clean, begin, end = data.completions[row], max(start, 0), min(start + 4, 12)
            logits = denoiser.model(
                torch.cat([prompt, clean[:begin], noisy[begin:end]])[None]
            ).logits
            log_probs = logits[0, len(prompt) :].index_fill(1, torch.tensor([5]), -torch.inf)
            log_probs = log_probs.log_softmax(1)
            block = (start + len(prompt) % 4) // 4
            for i in range(begin, end):
                if noisy[i] == 5:
                    total -= log_probs[i, clean[i]] / rates[row, block]
    torch.testing.assert_close(loss.detach(), total / (3 * 12), rtol=1e-6, atol=1e-6)


def test_supervised_batches_differ_by_step_and_seed() -> None:
    denoiser, data = supervised("sdar")
    losses = {
        float(supervised_loss(denoiser, data, seed, step)) for seed in (0, 1) for step in (1, 2)
    }
    assert len(losses) == 4
