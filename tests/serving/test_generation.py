"""Completions of chat prompts, and held-out evaluation, on a tiny random model."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from egspo.config import GenerationConfig
from egspo.models import LLaDAForMaskedLM, add_lora, new_model
from egspo.models.tokenization import character_tokenizer, encode_prompts
from egspo.rewards.scoring import RewardError
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import check_context
from egspo.serving.generation import generate
from egspo.serving.named_model import GENERATION_FILE, save_generation_config
from egspo.tasks import Example, Reward, Task
from egspo.tasks.prompts import PromptSet
from egspo.training.evaluation import average, evaluate

CONTEXT = 32
CONFIG = GenerationConfig(max_new_tokens=8, steps=4, block_length=4, temperature=1.0, batch_size=16)
GREEDY = replace(CONFIG, temperature=0.0)
TOKENIZER = character_tokenizer()


@functools.cache
def model() -> LLaDAForMaskedLM:
    fields = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "mlp_hidden_size": 48,
        "vocab_size": len(TOKENIZER),
        "embedding_size": len(TOKENIZER),
        "max_sequence_length": CONTEXT,
        "init_std": 0.2,
        "mask_token_id": TOKENIZER.mask_token_id,
        "eos_token_id": TOKENIZER.eos_token_id,
        "pad_token_id": TOKENIZER.pad_token_id,
    }
    return new_model(fields, seed=0)


def chats(*contents: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": content}] for content in contents]


PROMPTS = chats("1", "1234\n3412", "00", "21\n43\n", "4321\n1", "\n")


def run(prompts: Any = PROMPTS, config: GenerationConfig = CONFIG, **options: Any) -> list[str]:
    return generate(model(), TOKENIZER, prompts, config, **options)


def test_completions_are_text_of_the_alphabet() -> None:
    texts = run()
    assert len(texts) == len(PROMPTS)
    assert all(set(text) <= set("01234\n") and len(text) <= 8 for text in texts)
    assert any(texts)


@pytest.mark.parametrize("config", [CONFIG, GREEDY], ids=["sampled", "greedy"])
def test_completions_do_not_depend_on_the_batch(config: GenerationConfig) -> None:
    together = run(config=config)
    for count in range(1, len(PROMPTS)):
        assert run(PROMPTS[:count], config) == together[:count]
    for size in (1, 2, 5):
        assert run(config=replace(config, batch_size=size)) == together


def test_greedy_completions_do_not_depend_on_place_or_seed() -> None:
    together = run(config=GREEDY)
    assert [run([prompt], GREEDY, seed=7)[0] for prompt in PROMPTS] == together
    assert run(PROMPTS[::-1], GREEDY) == together[::-1]
    assert len(set(together)) > 1


def test_sampling_is_a_function_of_the_seed() -> None:
    assert run() == run(seed=0)
    assert run(seed=1) != run(seed=0)


def test_equal_prompts_get_their_own_noise() -> None:
    assert len(set(run(chats("1") * 8))) > 1
    assert len(set(run(chats("1") * 8, GREEDY))) == 1


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_are_used() -> None:
    base = copy.deepcopy(model())
    adapted = add_lora(base, rank=4, alpha=8, dropout=0.5, seed=0)
    # A new adapter changes nothing, and its dropout is off although it is in training mode.
    assert generate(adapted.train(), TOKENIZER, PROMPTS, CONFIG) == run()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert generate(adapted, TOKENIZER, PROMPTS, CONFIG) != run()
    with adapted.disable_adapter():
        assert generate(adapted, TOKENIZER, PROMPTS, CONFIG) == run()


@pytest.mark.parametrize("config", [CONFIG, GREEDY], ids=["sampled", "greedy"])
def test_masks_are_never_sampled_and_text_ends_at_eos(config: GenerationConfig) -> None:
    forced = copy.deepcopy(model())
    with torch.no_grad():
        head = forced.get_output_embeddings().weight
        head.zero_()[TOKENIZER.mask_token_id] = 100.0
        assert all(text == "" for text in generate(forced, TOKENIZER, PROMPTS, GREEDY))
        # Equal logits everywhere: the mask and nothing else must be impossible.
        head.zero_()
    texts = generate(forced, TOKENIZER, chats("1") * 40, replace(CONFIG, temperature=1.0))
    assert len(set("".join(texts))) == 6


def test_a_mask_in_the_prompt_is_not_filled_in() -> None:
    texts = run(chats("1<|mask|>2", "1"), GREEDY)
    assert texts[1] == run(chats("1"), GREEDY)[0]


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, batch_size=1)])
def test_a_prompt_beyond_the_context_is_named(config: GenerationConfig) -> None:
    fits = CONTEXT - config.max_new_tokens - 2
    assert len(run(chats("1", "2" * fits), config)) == 2
    with pytest.raises(ValueError, match=rf"prompt 1 has 25 tokens .* 33 tokens .* of {CONTEXT}$"):
        run(chats("1", "2" * (fits + 1), "3"), config)


def test_check_context() -> None:
    check_context([[1] * 24, [1]], CONFIG, 32)
    check_context([[1] * 1000], CONFIG, None)
    check_context([], CONFIG, 32)
    with pytest.raises(ValueError, match=r"prompt 2 .*generation.max_new_tokens is 8"):
        check_context([[1] * 30, [1], [1] * 31], CONFIG, 32)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "prompts must not be empty"),
        (chats("1", ""), ValueError, "prompt 1 is empty"),
        (["1"], TypeError, "prompt 0 must be a list of chat messages"),
        (chats("1", "x"), ValueError, "prompt 1 has characters .*: 'x'"),
    ],
)
def test_bad_prompts(prompts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(prompts)


def test_generation_config_is_kept_beside_the_weights(tmp_path: Path) -> None:
    save_generation_config(CONFIG, tmp_path)
    stored = json.loads((tmp_path / GENERATION_FILE).read_text("utf-8"))
    assert GenerationConfig(**stored) == CONFIG


# --- Held-out evaluation


def evaluation(
    rewards: Sequence[Reward],
    solved: Callable[..., Any] | None = None,
    index: Sequence[int] = range(len(PROMPTS)),
    **options: Any,
) -> list[dict[str, float]]:
    examples = [Example(prompt, {"place": i}) for i, prompt in enumerate(PROMPTS)]
    task = Task("toy", examples, examples, rewards, solved=solved)
    tokens = {f"{name}_id": getattr(TOKENIZER, f"{name}_token_id") for name in _ROLES}
    return evaluate(
        Denoiser(model(), **tokens),
        TOKENIZER,
        task,
        PromptSet(examples, encode_prompts(TOKENIZER, PROMPTS)),
        CONFIG,
        **{"temperature": 0.0, "seed": 0, "index": index, **options},
    )


_ROLES = ("mask", "eos", "pad")


def length(completions: Sequence[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def place(completions: Sequence[str], place: Sequence[int], **_: Any) -> list[int]:
    return list(place)


def odd_places(place: Sequence[int], **_: Any) -> list[float | None]:
    return [1.0 if i % 2 else None for i in place]


def test_evaluation_scores_each_completion_with_its_columns() -> None:
    rewards = [Reward("length", length, weight=2.0), Reward("place", place)]
    solved = [len(text) > 2 for text in run(config=GREEDY)]
    records = evaluation(rewards, lambda completions, **_: [len(t) > 2 for t in completions])
    assert records == [
        {
            "reward": 2.0 * len(text) + i,
            "length": len(text),
            "place": i,
            "solved": float(solved[i]),
            "skipped": 0.0,
        }
        for i, text in enumerate(run(config=GREEDY))
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_evaluation_can_be_shared_out(temperature: float) -> None:
    options = {"temperature": temperature, "seed": 3}
    whole = evaluation([Reward("length", length)], **options)
    shares = [
        evaluation([Reward("length", length)], index=range(r, len(PROMPTS), 2), **options)
        for r in range(2)
    ]
    assert [shares[i % 2][i // 2] for i in range(len(PROMPTS))] == whole
    assert evaluation([Reward("length", length)], index=[]) == []


def test_evaluation_leaves_out_what_does_not_apply() -> None:
    records = evaluation([Reward("odd", odd_places)])
    assert records == [
        {"reward": 1.0, "odd": 1.0, "skipped": 0.0} if i % 2 else {"skipped": 1.0}
        for i in range(len(PROMPTS))
    ]


def test_a_reward_that_fails_in_evaluation_is_counted() -> None:
    def fails(**_: Any) -> list[float]:
        raise ValueError("no")

    records = evaluation([Reward("length", length), Reward("fails", fails)])
    assert all(set(record) == {"length", "skipped"} for record in records)
    assert average(records)["skipped"] == 1.0


def test_a_broken_metric_is_an_error() -> None:
    with pytest.raises(RewardError, match="'solved' returned nan"):
        evaluation([Reward("length", length)], lambda completions, **_: [math.nan] * 6)


def test_average_is_over_the_samples_that_have_a_metric() -> None:
    assert average([{"a": 1.0}, {"a": 3.0, "b": 5.0}, {}]) == {"a": 2.0, "b": 5.0}
    assert average([]) == {}
