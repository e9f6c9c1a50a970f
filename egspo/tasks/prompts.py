"""The task of a recipe, and its prompts as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from egspo.config import ModelConfig, TaskConfig, TrainConfig
from egspo.models import load_tokenizer
from egspo.models.tokenization import (
    SUDOKU_CHARACTERS,
    character_tokenizer,
    encode_prompts,
    set_thinking,
)
from egspo.tasks import Example, Task, build_task, load_task_file


@dataclass(frozen=True)
class PromptSet:
    """Examples with their tokenised prompts."""

    examples: Sequence[Example]
    token_ids: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.examples)

    def columns(self, index: Sequence[int]) -> dict[str, list[object]]:
        """Columns of the examples at ``index``, as reward functions take them."""
        names = self.examples[0].columns
        return {name: [self.examples[i].columns[name] for i in index] for name in names}

    def answers(self, index: Sequence[int], completions: Sequence[str]) -> list[str]:
        """Completions of the prompts at ``index``, with what the model was given of the answer."""
        pairs = zip(index, completions, strict=True)
        return [self.examples[i].prefill + completion for i, completion in pairs]


# Taken in ``reward/NAME`` and ``eval/NAME``.
_METRIC_NAMES = ("mean", "std", "reward", "solved", "skipped")


@dataclass(frozen=True)
class Data:
    """The task, and its prompts as tokens."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    train: PromptSet
    held_out: PromptSet
    """What training is evaluated on: the validation split, or the test split of a task without."""


def build_data(config: TrainConfig) -> Data:
    """Task and tokenised prompts; every prompt is tokenised now, so that a bad one fails now."""
    task = recipe_task(config.task)
    return tokenised(config, task, build_tokenizer(config.model, task.characters))


def build_tokenizer(config: ModelConfig, characters: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer named in the recipe, the checkpoint's, or one of the task's ``characters``."""
    source = config.tokenizer or config.path
    if source is not None:
        tokenizer = load_tokenizer(source)
    else:
        tokenizer = character_tokenizer(characters or SUDOKU_CHARACTERS)
    set_thinking(tokenizer, config.thinking)
    return tokenizer


def recipe_task(config: TaskConfig) -> Task:
    """The task of the recipe, with the rewards as the recipe wants them."""
    return configured_task(named_task(config, config.options), config)


def named_task(config: TaskConfig, options: Mapping[str, Any]) -> Task:
    """The task of the recipe, registered by the package or by ``task.file``."""
    if config.file is not None:
        load_task_file(config.file)
    return build_task(config.name, **options)


def configured_task(task: Task, config: TaskConfig) -> Task:
    """``task`` with the rewards as the recipe wants them.

    Raises:
        ValueError: an option names a reward that the task does not have.
    """
    names = [reward.name for reward in task.rewards]
    weights, intermediate = config.reward_weights, config.intermediate_rewards
    for option, given in (("reward_weights", weights), ("intermediate_rewards", intermediate)):
        for name in given or ():
            if name not in names:
                raise ValueError(f"task.{option} names {name!r}; {task.name} has {names}")
    rewards = [
        replace(
            reward,
            weight=weights.get(reward.name, reward.weight),
            timeout=config.reward_timeout or reward.timeout,
            intermediate=reward.intermediate
            if intermediate is None
            else reward.name in intermediate,
        )
        for reward in task.rewards
    ]
    return replace(task, rewards=rewards)


def tokenised(config: TrainConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> Data:
    """``task`` with its prompts as tokens."""
    held_out = task.validation or task.test
    train = prompt_set(task.train, tokenizer)
    most = config.task.max_prompt_tokens
    if most is not None:
        train = PromptSet(train.examples, [tokens[-most:] for tokens in train.token_ids])
    return Data(task, tokenizer, train, prompt_set(held_out[: config.eval.examples], tokenizer))


def prompt_set(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """``examples`` with their prompts as tokens; raises as ``encode_prompts``."""
    prompts, prefills = ([e.prompt for e in examples], [e.prefill for e in examples])
    return PromptSet(examples, encode_prompts(tokenizer, prompts, prefills))


def supervised_examples(config: TrainConfig, data: Data) -> Sequence[Example]:
    """The training examples of the task as ``sft.task_options`` changes it.

    Raises:
        ValueError: one of their prompts is held out.
    """
    assert config.sft is not None
    if not config.sft.task_options:
        return data.task.train
    options = {**config.task.options, **config.sft.task_options}
    examples = named_task(config.task, options).train
    held_out = {repr(e.prompt) for e in (*data.task.validation, *data.task.test)}
    for number, example in enumerate(examples):
        if repr(example.prompt) in held_out:
            raise ValueError(
                f"sft.task_options makes a held-out prompt supervised example {number}: keep the "
                "options that decide the split"
            )
    return examples


def check_task(config: TrainConfig, task: Task) -> None:
    """Rewards must serve the algorithm; raises as :func:`check_data`."""
    if not task.rewards:
        raise ValueError(f"task {task.name} has no reward function")
    for reward in task.rewards:
        if reward.name in _METRIC_NAMES:
            raise ValueError(f"a reward may not be called {reward.name!r}: a metric has that name")
    if config.algorithm.completes and not any(r.intermediate for r in task.rewards):
        raise ValueError(
            "algorithm.stepwise (EGSPO-SA) needs a reward that scores one-step completions, and "
            f"task {task.name} has none with task.intermediate_rewards="
            f"{config.task.intermediate_rewards}"
        )
