"""Held-out evaluation: decode, score, average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from egspo.config import GenerationConfig
from egspo.models.tokenization import decode_completions
from egspo.rewards.scoring import score_completions
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout
from egspo.rollouts.trajectory import PromptBatch
from egspo.tasks.base import Reward, Task
from egspo.tasks.prompts import PromptSet


def evaluate(
    denoiser: Denoiser,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: PromptSet,
    generation: GenerationConfig,
    *,
    temperature: float,
    seed: int,
    index: Sequence[int],
    on_error: Literal["raise", "skip"] = "skip",
) -> list[dict[str, float]]:
    """Decode the prompts at ``index`` once each and score them.

    Args:
        temperature: of the sampling; 0 is greedy.
        seed: key of the noise; a prompt's own is by its place in ``prompts``.
        index: places in ``prompts``.
        on_error: what a reward function that fails does; ``solved`` always raises.

    Returns:
        For every prompt: ``reward``, each reward function by name, ``solved`` where the task
        defines it, and ``skipped``, 1.0 where no reward applies or one failed, else 0.0. A reward
        that failed or does not apply is left out of the record.

    Raises:
        RewardError: naming the function that failed.
    """
    if not index:
        return []
    batch = PromptBatch.from_lists(
        [prompts.token_ids[i] for i in index], denoiser.pad_id, denoiser.device
    )
    trajectory = rollout(
        denoiser,
        batch,
        replace(generation, temperature=temperature),
        seed=seed,
        sequence_ids=torch.tensor(index, device=denoiser.device),
    )
    texts = decode_completions(tokenizer, trajectory.tokens.tolist(), denoiser.eos_id)
    return score(task, prompts, index, texts, on_error=on_error)[0]


def score(
    task: Task,
    prompts: PromptSet,
    index: Sequence[int],
    texts: Sequence[str],
    *,
    on_error: Literal["raise", "skip"],
) -> tuple[list[dict[str, float]], list[str]]:
    """Score N completions of the prompts at ``index``, which may repeat.

    Returns:
        What :func:`evaluate` does, and what went wrong where failures are skipped.

    Raises:
        RewardError: as :func:`evaluate`.
    """
    messages = [prompts.examples[i].prompt for i in index]
    columns, texts = prompts.columns(index), prompts.answers(index, texts)
    scored = score_completions(task.rewards, messages, texts, columns, on_error=on_error)
    skipped = scored.total.isnan().double()
    named = {"reward": scored.total, **scored.per_function, "skipped": skipped}
    if task.solved is not None:
        solved = Reward("solved", task.solved)
        named["solved"] = score_completions([solved], messages, texts, columns).total
    records = [
        {name: float(values[i]) for name, values in named.items() if not values[i].isnan()}
        for i in range(len(index))
    ]
    return records, scored.errors


def average(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every metric over the samples that have it, whatever their order."""
    names = {name for record in records for name in record}
    result = {}
    for name in sorted(names):
        values = [record[name] for record in records if name in record]
        result[name] = math.fsum(values) / len(values)
    return result
