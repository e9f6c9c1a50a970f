"""lm-evaluation-harness on a tiny model with tiny local tasks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed (egspo[lm-eval])")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from egspo.config import GenerationConfig
from egspo.evaluations.lm_eval_adapter import EgspoLM, register
from egspo.models import load_model, load_tokenizer
from egspo.serving.generation import generate
from egspo.serving.likelihood import greedily_decoded, likelihood_bounds
from egspo.training.trainer import train
from tests.families import BLOCK_CAUSAL, new_fields
from tests.helpers import runs

# lm-eval takes a text of digits alone for a number.
QUESTIONS = ["12\n34", "4\n321\n", "2\n2", "1\n1", "33\n1"]
CHOICES = ["12", "4", "31"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
        train(runs.config(folder, {"steps": 2}))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """``answer`` asks for text, ``choose`` for the best of three."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    rows = [
        {"question": question, "answer": "1", "choices": CHOICES, "label": i % 3}
        for i, question in enumerate(QUESTIONS)
    ]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1},
    }
    answer = {
        "task": "answer",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": ["3", "\n"],
            "max_gen_toks": 30,
            "do_sample": True,
            "temperature": 1.0,
        },
        "metric_list": [{"metric": "exact_match"}],
    }
    choose = {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    for task in (answer, choose):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(tasks: TaskManager, trained: Path, task: str, **options: Any) -> dict[str, Any]:
    register()
    result = simple_evaluate(
        model="egspo",
        model_args={"pretrained": str(trained), "mc_samples": 4, "seed": 3},
        tasks=[task],
        task_manager=tasks,
        bootstrap_iters=0,
        **options,
    )
    assert result is not None
    return dict(result)


def check_generation(tasks: TaskManager, trained: Path, block_length: int) -> None:
    result = evaluate(tasks, trained, "answer", apply_chat_template=True)
    samples = sorted(result["samples"]["answer"], key=lambda sample: sample["doc_id"])
    model = load_model(trained / "final" / "model")
    tokenizer = load_tokenizer(trained / "final" / "model")
    # 30 tokens asked for: whole blocks, with as many tokens per step as in training.
    length = -(-30 // block_length) * block_length
    config = GenerationConfig(
        max_new_tokens=length, steps=length // 4, block_length=block_length, temperature=1.0
    )
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = generate(model, tokenizer, messages, config, seed=3)
    assert any("3" in text or "\n" in text for text in texts)
    expected = [text.split("3")[0].split("\n")[0] for text in texts]
    assert [sample["resps"][0][0] for sample in samples] == expected
    solved = sum(text == "1" for text in expected) / len(expected)
    assert result["results"]["answer"]["exact_match,none"] == solved


def check_choices(tasks: TaskManager, trained: Path) -> None:
    result = evaluate(tasks, trained, "choose")
    samples = sorted(result["samples"]["choose"], key=lambda sample: sample["doc_id"])
    lm = EgspoLM(str(trained), mc_samples=4, seed=3)
    right = 0
    for i, (question, sample) in enumerate(zip(QUESTIONS, samples, strict=True)):
        # lm-eval counts spaces at the end of the prompt to the completion.
        pairs = [lm._encode_pair(question, choice) for choice in CHOICES]
        bounds = likelihood_bounds(lm.denoiser, pairs, samples=4, seed=3, batch_size=8)
        greedy = greedily_decoded(lm.denoiser, pairs, batch_size=8)
        found = [response[0] for response in sample["resps"]]
        assert [float(value) for value, _ in found] == pytest.approx(bounds, rel=1e-5)
        assert [str(flag) == "True" for _, flag in found] == greedy
        right += bounds.index(max(bounds)) == i % 3
    assert result["results"]["choose"]["acc,none"] == right / len(QUESTIONS)


def test_generation_is_the_rollout_s_cut_at_the_first_stop_string(
    tasks: TaskManager, trained: Path
) -> None:
    check_generation(tasks, trained, 20)


def test_choices_are_compared_by_the_bound(tasks: TaskManager, trained: Path) -> None:
    check_choices(tasks, trained)


@pytest.mark.slow
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_block_causal_models(
    family: str, tasks: TaskManager, tmp_path: Path, no_plots: None
) -> None:
    changes = {"model": {"config": new_fields(family)}, "generation": {"block_length": 4}}
    train(runs.config(tmp_path / "run", {"model": {"config": None}}, changes, {"steps": 2}))
    check_generation(tasks, tmp_path / "run", 4)
    check_choices(tasks, tmp_path / "run")


def request(context: str, **options: Any) -> SimpleNamespace:
    return SimpleNamespace(args=(context, options))


@pytest.mark.parametrize("size", ["auto", "auto:4", None])
def test_an_automatic_batch_size_is_the_one_trained_with(trained: Path, size: str | None) -> None:
    assert "batch_size" not in EgspoLM(str(trained), batch_size=size).given


def test_what_tasks_may_ask_for(trained: Path) -> None:
    lm = EgspoLM(str(trained), max_new_tokens=20, steps=20, batch_size=2)
    prompts = ["12", "4321", "2"]
    greedy = lm.generate_until([request(p, until=[], top_k=5) for p in prompts], True)
    assert greedy == lm.generate_until([request(p, temperature=0.0) for p in prompts], True)
    sampled = [request("12", do_sample=True, temperature=1.5) for _ in range(4)]
    assert len(set(lm.generate_until(sampled, True))) > 1  # repeats have noise of their own
    with pytest.raises(ValueError, match=r"top_p=0.9: not for this model"):
        lm.generate_until([request("1", do_sample=True, temperature=1.0, top_p=0.9)], True)
    with pytest.raises(ValueError, match="request 0 and its completion have 70 tokens"):
        lm.generate_until([request("1" * 50)], True)
    with pytest.raises(NotImplementedError, match="perplexity"):
        lm.loglikelihood_rolling([request("12")])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"temperature": 1.0}, "temperature is the task's"),
        ({"mc_samples": 0}, "mc_samples must be a whole number >= 1, got 0"),
        ({"batch_size": "many"}, "batch_size must be a whole number or auto, got 'many'"),
        ({"blok_length": 8}, "blok_length: unknown key; did you mean block_length"),
        ({"policy": "best"}, "policy: expected one of"),
        ({"adapter": "RUN"}, "has no adapter but the model"),
    ],
)
def test_bad_model_args(arguments: dict[str, Any], problem: str, trained: Path) -> None:
    given = {name: str(trained) if value == "RUN" else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=problem):
        EgspoLM(str(trained), **given)
