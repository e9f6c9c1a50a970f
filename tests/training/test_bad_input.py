"""What is wrong is named, before work is lost; what was made until then is kept."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import egspo.engines.whole
import egspo.training.sft
from egspo.algorithm.replay import Scorer
from egspo.cli import main
from egspo.config.convert import ConfigError
from egspo.engines.optimization import NonFiniteError
from egspo.models import new_model
from egspo.models.tokenization import character_tokenizer
from egspo.rewards.scoring import RewardError
from egspo.rollouts.denoiser import Denoiser
from egspo.runs.checkpoint import find_checkpoint
from egspo.runs.metrics import read_metrics
from egspo.tasks import Reward
from egspo.training.trainer import train
from egspo.training.warm_start import run_sft
from tests.helpers import runs
from tests.helpers.runs import LETTERS, outcome

SFT: dict[str, Any] = {"sft": {"steps": 4, "batch_size": 4}}
SHORT = {"max_new_tokens": 4, "steps": 4, "block_length": 4}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
    monkeypatch.setenv("EGSPO_CACHE", str(tmp_path / "cache"))
    runs.rewards[:] = [Reward("ones", runs.ones)]
    yield
    runs.rewards.clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"entropy_share": 1.5}}, r"entropy_share must be in \(0, 1\], .* got 1.5"),
        (
            {"algorithm": {"entropy_share": 0.7, "strategy": "uniform"}},
            r"entropy_share \(0.7\) .* needs algorithm.strategy: high_entropy, got uniform",
        ),
        ({"algorithm": {"selected_steps": 6}}, r"selected_steps \(6\) .* generation.steps \(5\)"),
        ({"generation": {"block_length": 5, "steps": 6}}, r"generation.steps \(6\) .* 4 blocks"),
        ({"generation": {"steps": 25}}, "at most one step per token"),
        ({"generation": {"block_length": 3}}, r"max_new_tokens \(20\) must be a multiple"),
        ({"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens must be > 0, got 0"),
        ({"generation": {"temperature": 0}}, "greedy rollouts have no gradient"),
        ({"algorithm": {"group_size": 1}}, "algorithm.group_size must be >= 2, got 1"),
        ({"algorithm": {"beta": -0.1}}, "algorithm.beta must be >= 0, got -0.1"),
        ({"algorithm": {"clip_low": 1.5}}, r"algorithm.clip_low must be in \[0, 1\], got 1.5"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"optimizer: betas must be in \[0, 1\)"),
        ({"eval": {"examples": 0}}, "eval.examples must be > 0, or null for all, got 0"),
        ({"eval": {"temperature": -1}}, "eval.temperature must be >= 0"),
        ({"model": {"lora": {"alpha": 0}}}, "model.lora.alpha must be > 0"),
        ({"generation": {"guidance": -1}}, "generation.guidance must be >= 0, got -1"),
        ({"generation": {"threshold": 1.5}}, r"generation.threshold must be in \(0, 1\], got 1.5"),
        (
            {"generation": {"threshold": 0.5, "policy": "entropy"}},
            r"score in \[0, 1\], which policy 'entropy' does not have; choose from .*'margin'",
        ),
        ({"generation": {"max_tokens_per_step": 4}}, r"\(4\) needs generation.threshold"),
        (
            {"generation": {"threshold": 0.5, "max_tokens_per_step": 3}},
            r"between 4, the quota of a step, and generation.block_length \(20\), got 3",
        ),
        (
            {"generation": {"cache": "dual"}, "algorithm": {"entropy_over": "masked"}},
            "entropy_over: masked needs the hidden states of later blocks",
        ),
        ({"algorithm": {"detach_cache": True}}, "detach_cache needs a generation.cache"),
    ],
)
def test_configurations_that_cannot_work(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        runs.config(tmp_path, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"name": "sudoko"}}, "unknown task 'sudoko', did you mean 'sudoku'"),
        ({"task": {"options": {"empty": 3}}}, "task sudoku has no option 'empty', did you mean"),
        ({"task": {"reward_weights": {"cells": 1.0}}}, "task.reward_weights names 'cells'"),
        ({"task": {"intermediate_rewards": ["x"]}}, "task.intermediate_rewards names 'x'; sudoku"),
        (
            {"task": {"intermediate_rewards": []}},
            r"stepwise .*intermediate_rewards=\[\]",
        ),
        ({"model": {"config": {"max_sequence_length": 30}}}, "prompt 0 has .* context of 30"),
        ({"model": {"config": {"n_headz": 2}}}, r"unknown fields .* \['n_headz'\]"),
        ({"model": {"lora": {"target_modules": ["q"]}}}, "target_modules has 'q'"),
        ({"generation": {"cuda_graphs": True}}, "generation.cuda_graphs needs a GPU"),
        ({"model": {"attn_implementation": "flex_attention"}}, "no backward pass on a CPU"),
        ({"trackers": ["wandb"]}, r"trackers has 'wandb', .* pip install 'egspo\[wandb\]'"),
        ({"sft": {"steps": 2}, **LETTERS, "generation": SHORT}, "target .* 0 has 6 tokens"),
    ],
)
def test_what_does_not_fit_together(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found with a warm start in the recipe too, and before it is trained."""
    monkeypatch.setattr("egspo.training.build.get_available_trackers", list)
    # (The adapter is made after the warm start, which is kept.)
    for more in ({},) if "target_modules" in message else ({}, SFT):
        with pytest.raises(ValueError, match=message):
            train(runs.config(tmp_path / "run", more, changes))
        assert not list((tmp_path / "run").rglob("*.jsonl"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_data_set(split: str, tmp_path: Path) -> None:
    config = runs.config(tmp_path / "run", LETTERS)
    config.task.options[split] = 0
    with pytest.raises(ValueError, match=f"task letters has no {split} examples"):
        train(config)
    assert not list((tmp_path / "run").rglob("*.jsonl"))


def test_an_empty_choice_of_intermediate_rewards_suits_egspo(tmp_path: Path) -> None:
    changes = {"task": {"intermediate_rewards": []}, "algorithm": {"stepwise": False}}
    train(runs.config(tmp_path, changes, {"steps": 1}))


@pytest.mark.parametrize("name", ["mean", "std", "reward", "solved", "skipped"])
def test_a_reward_with_the_name_of_a_metric(name: str, tmp_path: Path) -> None:
    runs.rewards.append(Reward(name, runs.ones))
    with pytest.raises(ValueError, match=f"may not be called '{name}'"):
        train(runs.config(tmp_path, LETTERS))


def test_a_task_without_a_reward(tmp_path: Path) -> None:
    runs.rewards.clear()
    with pytest.raises(ValueError, match="task letters has no reward function"):
        train(runs.config(tmp_path, LETTERS))


def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    """The head's weight is used directly: what an adapter adds to it would be lost silently."""
    model = new_model({**runs.MODEL, "vocab_size": 13, "embedding_size": 13}, seed=0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["model.transformer.ff_out"]))
    with pytest.raises(ValueError, match="also adapts the LM head"):
        Denoiser(adapted, mask_id=2, eos_id=1, pad_id=0)


@pytest.mark.parametrize("token", ["mask", "eos"])
def test_a_tokenizer_without_a_special_token(token: str, tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    setattr(tokenizer, f"{token}_token", None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    changes = {"model": {"tokenizer": str(tmp_path / "tokenizer")}}
    with pytest.raises(ValueError, match=f"no {token} token"):
        train(runs.config(tmp_path / "run", SFT, changes))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "llama"}, ValueError, "model_type 'llama'; supported are"),
        ({"vocab_size": 7}, ValueError, "model_type None"),
        ({}, FileNotFoundError, "it has no config.json"),
        (None, FileNotFoundError, "no tokenizer at"),
    ],
)
def test_a_checkpoint_of_another_kind(
    config: dict[str, Any] | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if config is not None:
        character_tokenizer().save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
    changes = {"model": {"config": None, "path": str(folder)}}
    with pytest.raises(error, match=message):
        train(runs.config(tmp_path / "run", changes))


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**runs.RECIPE, "output_dir": str(tmp_path / "run")}))
    assert main(["train", str(recipe), "task.options.train_examples=0"]) == 2
    error = capsys.readouterr().err
    assert error == "egspo: error: train_examples must be a whole number >= 1, got 0\n"


@pytest.mark.parametrize("start", [train, run_sft])
def test_no_room_is_found_at_the_start(
    start: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match=r"output_dir .*run has 1e-06 GB free, .*keep_last"):
        start(runs.config(tmp_path / "run", SFT if start is run_sft else {}))
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("start", [train, run_sft])
def test_an_output_that_cannot_be_written_is_found_at_the_start(
    start: Callable[[Any], Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir .*file/run cannot be written"):
        start(runs.config(tmp_path / "file" / "run", SFT))
    assert not (tmp_path / "cache").exists()  # not even a warm start was trained


def fails(**_: Any) -> list[float]:
    raise ConnectionError("the judge does not answer")


def bad_at_one_place(value: Any) -> Callable[..., list[Any]]:
    def function(completions: list[str], place: list[int], **_: Any) -> list[Any]:
        return [
            value if i == 1 else text.count("1") for i, text in zip(place, completions, strict=True)
        ]

    return function


FAILURES: list[tuple[Callable[..., Any], str]] = [
    (fails, "'bad' raised ConnectionError: the judge does not answer"),
    (lambda completions, **_: [0.0] * (len(completions) - 1), r"'bad' returned \d values for"),
    (lambda completions, **_: None, "'bad' returned NoneType, expected a list"),
    (bad_at_one_place(math.nan), "'bad' returned nan for completion"),
    (bad_at_one_place(math.inf), "'bad' returned inf for completion"),
    (bad_at_one_place("high"), "'bad' returned 'high' for completion"),
]


@pytest.mark.parametrize(("function", "message"), FAILURES)
def test_a_reward_that_fails_stops_the_run(
    function: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    """At the first evaluation, before anything is trained."""
    runs.rewards.append(Reward("bad", function))
    with pytest.raises(RewardError, match=message):
        train(runs.config(tmp_path, LETTERS))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("function", "message"), FAILURES)
def test_a_reward_that_fails_is_skipped_counted_and_reported(
    function: Callable[..., Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs.rewards.append(Reward("bad", function))
    skip = {"task": {"name": "letters", "on_reward_error": "skip", "options": None}}
    train(runs.config(tmp_path, LETTERS, skip, {"prompts_per_step": 6, "steps": 2}))
    whole = function is fails or not message.endswith("for completion")
    records = read_metrics(tmp_path)
    for record in records[1:]:
        # All 24, or the 4 of the prompt at place 1; each epoch has every one of 6 prompts once.
        assert record["skipped/rewards"] == (24 if whole else 4)
        assert (record["reward/mean"] is None) == (record["updates"] == 0) == whole
        assert record["reward/equal_groups"] == 6 if whole else record["reward/equal_groups"] >= 1
    assert records[0]["eval/skipped"] == (1.0 if whole else 0.25)
    warnings = [record.getMessage() for record in caplog.records if record.name == "egspo"]
    count = 24 if whole else 4
    assert any(text.startswith(f"step 2: {count} of 24 samples skipped: ") for text in warnings)
    weights = load_file(tmp_path / "final" / "model" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_a_reward_that_does_not_apply_is_no_failure(tmp_path: Path) -> None:
    """A group to which nothing applies is left out, whatever ``on_reward_error`` says."""
    runs.rewards[:] = [Reward("bad", bad_at_one_place(None))]
    train(runs.config(tmp_path, LETTERS, {"prompts_per_step": 6, "steps": 1}))
    record = read_metrics(tmp_path)[1]
    assert record["skipped/rewards"] == 4
    assert record["reward/mean"] == record["reward/bad"] is not None


def test_a_skipped_sample_stays_out_of_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of the KL too: no state of it is replayed."""

    def one_in_four_fails(completions: list[str], **_: Any) -> list[float]:
        values = [text.count("1") + 0.01 * i for i, text in enumerate(completions)]
        return [math.nan if i % 4 == 0 else value for i, value in enumerate(values)]

    runs.rewards[:] = [Reward("bad", one_in_four_fails)]
    rows: list[list[int]] = []
    replay = Scorer.replay

    def spy(self: Scorer, states: Any, groups: Any, **options: Any) -> Any:
        rows.append(sorted(set(states.row.tolist())))
        return replay(self, states, groups, **options)

    monkeypatch.setattr(Scorer, "replay", spy)
    changes = {"task": {"name": "letters", "on_reward_error": "skip", "options": None}}
    algorithm = {
        "algorithm": {"beta": 0.1, "stop_at_eos": False, "stepwise": False},
        "generation": {"early_exit": False},
    }
    train(runs.config(tmp_path, LETTERS, changes, algorithm, {"steps": 1}))
    assert rows == [[1, 2, 3, 5, 6, 7]]
    record = read_metrics(tmp_path)[1]
    assert record["selected/states"] == 18
    assert record["advantage/mean"] == pytest.approx(0.0, abs=1e-12)


def at_call(
    monkeypatch: pytest.MonkeyPatch, name: str, call: int, *, before: Callable[..., None]
) -> None:
    """``before`` gets the arguments of the ``call``-th call of ``egspo.engines.whole.<name>``."""
    original, count = getattr(egspo.engines.whole, name), 0

    def counting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            before(*arguments)
        return original(*arguments)

    monkeypatch.setattr(egspo.engines.whole, name, counting)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights did not take it: the last good step is saved, and can be gone on from."""
    whole = {"checkpoint": {"every": 0}, "micro_batch_size": 100}
    train(runs.config(tmp_path / "whole", whole))
    config = runs.config(tmp_path / "run", whole)
    surrogate, count = Scorer.surrogate, 0

    def spoiled(self: Scorer, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        result = surrogate(self, *arguments)
        return result._replace(loss=result.loss * value) if count == 3 else result

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "surrogate", spoiled)
        with pytest.raises(NonFiniteError, match=r"the loss is -?(nan|inf) at step 3"):
            train(config)
    assert find_checkpoint(tmp_path / "run").name == "step-000002"
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [0, 1, 2]
    train(config, resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_gradient_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: torch.nn.Module, limit: float) -> None:
        next(p.grad for p in model.parameters() if p.grad is not None)[0] = math.nan

    at_call(monkeypatch, "clip_gradients", 3, before=spoil)
    with pytest.raises(NonFiniteError, match="the gradient norm is nan; the weights did not"):
        train(runs.config(tmp_path, {"checkpoint": {"every": 0}}))
    assert find_checkpoint(tmp_path).name == "step-000002"


def test_weights_that_are_no_numbers_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good checkpoints are not given up for them, and the model's output names what is wrong."""

    def spoil(optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(math.nan)

    for every, error, message in (
        (2, FloatingPointError, "NaN logits at denoising step 0"),
        (1, NonFiniteError, r"after step 3 the weight \S+ has NaN"),
    ):
        with monkeypatch.context() as patch:
            at_call(patch, "apply_gradients", 3, before=spoil)
            output = tmp_path / str(every)
            with pytest.raises(error, match=message):
                train(runs.config(output, {"checkpoint": {"every": every, "keep_last": 1}}))
        assert find_checkpoint(output).name == "step-000002"


def test_a_supervised_loss_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = egspo.training.sft.supervised_loss

    def spoiled(denoiser: Any, data: Any, seed: int, step: int) -> torch.Tensor:
        return original(denoiser, data, seed, step) * (math.nan if step == 4 else 1.0)

    monkeypatch.setattr(egspo.training.sft, "supervised_loss", spoiled)
    with pytest.raises(NonFiniteError, match="the supervised loss is nan at step 4; the weights"):
        run_sft(runs.config(tmp_path, SFT, {"checkpoint": {"every": 0}}))
    assert find_checkpoint(tmp_path).name == "step-000003"


@pytest.mark.parametrize(("stepwise", "beta"), [(True, 0.0), (False, 0.0), (False, 0.1)])
def test_nothing_to_learn_from_is_no_error(tmp_path: Path, stepwise: bool, beta: float) -> None:
    """Every completion is worth the same: no update but for the KL, and no metric made up."""
    runs.rewards[:] = [Reward("flat", lambda completions, **_: [0.5] * len(completions))]
    options = {"stepwise": stepwise, "beta": beta}
    train(runs.config(tmp_path, LETTERS, {"steps": 2, "algorithm": options}))
    for record in read_metrics(tmp_path)[1:]:
        assert record["reward/mean"] == 0.5 and record["reward/std"] == 0
        assert record["reward/equal_groups"] == 2
        assert record["skipped/groups"] == (0 if stepwise or beta else 2)
        assert record["skipped/states"] == (record["selected/states"] if stepwise else 0)
        assert record["updates"] == (1 if beta else 0)
        for name in ("loss", "kl", "ratio/drift", "grad_norm", "clip/low"):
            assert (record[name] is None) == (beta == 0)
