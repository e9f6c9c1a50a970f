"""Supervised training and the cached warm start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from egspo.config import TrainConfig
from egspo.models import load_model
from egspo.runs.metrics import read_metrics
from egspo.runs.published import verify_published
from egspo.tasks.prompts import build_data, supervised_examples
from egspo.training.build import fresh_model, plain_denoiser
from egspo.training.sft import SupervisedData, supervised_loss
from egspo.training.trainer import train
from egspo.training.warm_start import cache_folder, run_sft, warm_start
from tests.helpers import runs
from tests.helpers.runs import LETTERS

SFT: dict[str, Any] = {"sft": {"steps": 30, "batch_size": 7, "optimizer": {"learning_rate": 1e-2}}}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
    monkeypatch.setenv("EGSPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def letters() -> Iterator[None]:
    runs.rewards[:] = [runs.Reward("ones", runs.ones)]
    yield
    runs.rewards.clear()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_model(folder).state_dict().items()}


def supervised(config: TrainConfig) -> tuple[Any, SupervisedData]:
    data = build_data(config)
    model = fresh_model(config.model, data.tokenizer, 0, CPU)
    denoiser = plain_denoiser(config, model, data.tokenizer, torch.device("cpu"))
    length = config.generation.max_new_tokens
    return denoiser, SupervisedData.encode(data.tokenizer, data.task.train, length, denoiser)


@pytest.mark.usefixtures("letters")
def test_the_loss_is_an_unbiased_bound(tmp_path: Path) -> None:
    """Of a model that knows nothing it is log(V), whatever was masked; the head bans [MASK].

    Prompts of different lengths, and completions filled up with EOS.
    """
    denoiser, data = supervised(runs.config(tmp_path, LETTERS))
    assert not bool(data.prompts.mask.all())
    assert data.completions[0].tolist().count(denoiser.eos_id) == 2
    with torch.no_grad():
        denoiser.head_weight.zero_()
        losses = [float(supervised_loss(denoiser, data, 0, step)) for step in range(200)]
    expected = math.log(denoiser.head_weight.shape[0] - 1)
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=0.02)


@pytest.mark.usefixtures("letters")
def test_a_batch_of_one_may_have_nothing_masked(tmp_path: Path) -> None:
    denoiser, data = supervised(runs.config(tmp_path, LETTERS))
    one = data.batch(0, 0, 1)
    losses = [supervised_loss(denoiser, one, 0, step) for step in range(60)]
    assert any(float(loss) == 0.0 for loss in losses)
    for loss in losses:
        loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in denoiser.model.parameters())


def test_batches_are_epochs_of_permutations(tmp_path: Path) -> None:
    _, data = supervised(runs.config(tmp_path))
    rows = [data.batch(3, step, 2).completions for step in range(7)]
    for epoch in (torch.cat(rows)[:7], torch.cat(rows)[7:]):
        assert sorted(epoch.tolist()) == sorted(data.completions.tolist())


@pytest.mark.usefixtures("letters")
def test_learns_the_completions(tmp_path: Path) -> None:
    config = runs.config(tmp_path, LETTERS, SFT, {"sft": {"steps": 120, "log_every": 40}})
    final = run_sft(config)
    records = read_metrics(tmp_path / "sft_metrics.jsonl")
    assert [record["step"] for record in records] == [40, 80, 120]
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    changes = {"model": {"config": None, "path": str(final / "model")}, "steps": 1}
    train(runs.config(tmp_path / "rl", LETTERS, changes, {"eval": {"every": 1}}))
    assert read_metrics(tmp_path / "rl")[0]["eval/reward"] > 0.6


def test_neither_uses_nor_touches_the_global_random_state(tmp_path: Path) -> None:
    dropout = {"model": {"config": {"residual_dropout": 0.3}}}
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        final = run_sft(runs.config(tmp_path / str(seed), SFT, dropout, {"sft": {"steps": 3}}))
        assert torch.equal(torch.get_rng_state(), before)
        results.append((final / "model" / "model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_an_adapter_alone_is_trained(tmp_path: Path) -> None:
    lora = {"model": {"lora": {"rank": 2, "alpha": 4, "dropout": 0.5}}, "sft": {"steps": 2}}
    final = run_sft(runs.config(tmp_path, SFT, lora))
    assert [path.name for path in final.iterdir() if path.is_dir()] == ["adapter"]


def test_the_warm_start_is_trained_once(tmp_path: Path, cache: Path) -> None:
    changes = (SFT, {"steps": 1, "eval": {"every": 0}})
    train(runs.config(tmp_path / "a", *changes))
    assert (tmp_path / "a" / "warm_start" / "sft_metrics.jsonl").exists()
    (cached,) = (cache / "warm_start").iterdir()
    train(runs.config(tmp_path / "b", *changes, {"seed": 5}))
    assert not (tmp_path / "b" / "warm_start").exists()
    first = [read_metrics(tmp_path / run)[0]["eval/reward"] for run in ("a", "b")]
    assert first[0] == first[1]
    assert weights(cached / "model").keys() == weights(tmp_path / "a" / "final" / "model").keys()


@pytest.mark.slow
def test_many_that_start_at_once_share_one_warm_start(tmp_path: Path, cache: Path) -> None:
    """On a cache that is empty, and then on one that is damaged."""
    context = runs.forkserver()
    for _ in range(2):
        ready = context.Barrier(12)
        processes = [
            context.Process(target=runs.warm_start_at_once, args=(tmp_path, number, ready))
            for number in range(12)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
            process.kill()
        assert [process.exitcode for process in processes] == [0] * 12
        (cached,) = (cache / "warm_start").iterdir()  # nothing half-written is left
        verify_published(cached)
        (cached / "model" / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"sft": {"steps": 3}}, False),
        ({"sft": {"seed": 1}}, False),
        ({"sft": {"task_options": {"empty_cells": 5}}}, False),
        ({"task": {"options": {"empty_cells": 5}}}, False),
        ({"model": {"config": {"n_heads": 1}}}, False),
        ({"mixed_precision": "bf16"}, False),
        ({"sft": {"log_every": 1}}, True),
        ({"seed": 1, "algorithm": {"lam": 0.1}, "model": {"dtype": "bfloat16"}}, True),
    ],
)
def test_the_cache_is_by_content(changes: dict[str, Any], same: bool, tmp_path: Path) -> None:
    first = runs.config(tmp_path, SFT, {"sft": {"steps": 2}})
    other = runs.config(tmp_path, SFT, {"sft": {"steps": 2}}, changes)
    folders = [warm_start(config, build_data(config), CPU) for config in (first, other)]
    assert (folders[0] == folders[1]) == same


def test_supervised_examples_may_differ_from_those_of_reinforcement(tmp_path: Path) -> None:
    easy = {"sft": {"task_options": {"empty_cells": [1, 2], "careless": 1.0}}}
    config = runs.config(tmp_path, SFT, easy)
    data = build_data(config)
    examples = supervised_examples(config, data)
    assert {example.prompt[0]["content"].count("0") for example in examples} == {1, 2}
    assert all(example.prompt[0]["content"].count("0") >= 6 for example in data.task.train)
    solutions = {example.columns["solution"] for example in examples}
    assert not solutions & {example.columns["solution"] for example in data.task.test}
    plain = runs.config(tmp_path, SFT)
    assert warm_start(config, data, CPU) != warm_start(plain, data, CPU)


@pytest.mark.usefixtures("letters")
def test_supervised_examples_must_not_be_held_out(tmp_path: Path) -> None:
    options = {"sft": {"task_options": {"train": 6}}}  # the task holds out its training prompts
    config = runs.config(tmp_path, LETTERS, SFT, options)
    with pytest.raises(ValueError, match=r"sft.task_options makes a held-out prompt supervised"):
        supervised_examples(config, build_data(config))


@pytest.mark.parametrize("damage", ["weights", "manifest", "file"])
def test_a_damaged_cache_is_made_anew(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = runs.config(tmp_path, SFT, {"sft": {"steps": 2}})
    folder = warm_start(config, build_data(config), CPU)
    before = weights(folder)
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(b"nonsense")
    elif damage == "manifest":
        (folder.parent / "manifest.json").write_text("{")
    else:
        (folder.parent / "manifest.json").unlink()
    assert warm_start(config, build_data(config), CPU) == folder
    assert "the cached warm start is made anew" in caplog.text
    after = weights(folder)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_cache_that_cannot_be_written_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("EGSPO_CACHE", str(tmp_path / "occupied"))
    assert cache_folder() == tmp_path / "occupied"
    with pytest.raises(OSError, match=r"the warm-start cache \(EGSPO_CACHE\) .* cannot be written"):
        train(runs.config(tmp_path / "run", SFT))
    assert not (tmp_path / "run" / "warm_start").exists()


def test_precision_and_attention_of_a_new_model(tmp_path: Path) -> None:
    changes = {"model": {"dtype": "bfloat16", "attn_implementation": "eager"}}
    config = runs.config(tmp_path, changes)
    model = fresh_model(config.model, build_data(config).tokenizer, 0, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    single = fresh_model(
        replace(config.model, dtype="float32"), build_data(config).tokenizer, 0, CPU
    )
    assert {p.dtype for p in single.parameters()} == {torch.float32}


def test_one_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="egspo sft trains on one process"):
        run_sft(runs.config(tmp_path, SFT))
    with pytest.raises(ValueError, match="no sft section"):
        run_sft(runs.config(tmp_path))
