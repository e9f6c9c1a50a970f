"""How others count: the metrics of a task besides its own score."""

from __future__ import annotations

import math
from collections.abc import Sequence

from egspo.evaluations.records import Record
from egspo.rewards.scoring import score_completions
from egspo.tasks import Reward, Task
from egspo.tasks.prompts import PromptSet


def metric_means(task: Task, prompts: PromptSet, records: Sequence[Record]) -> dict[str, float]:
    """Mean of each metric of ``task`` over the samples it applies to, by their weights.

    Raises:
        RewardError: naming the metric that failed.
    """
    index = [record["index"] for record in records]
    texts = [record["completion"] for record in records]
    columns = prompts.columns(index)
    messages = [prompts.examples[i].prompt for i in index]
    means = {}
    for metric in task.metrics:
        scored = score_completions([Reward(metric.name, metric.function)], messages, texts, columns)
        weigh = metric.weight
        pairs = [
            (1.0 if weigh is None else weigh(prompts.examples[i].columns), value)
            for i, value in zip(index, scored.total.tolist(), strict=True)
            if not math.isnan(value)
        ]
        total = math.fsum(weight for weight, _ in pairs)
        if total:
            means[metric.name] = math.fsum(weight * value for weight, value in pairs) / total
    return means


def metric_notes(tasks: Sequence[Task]) -> list[str]:
    """What the metrics of these tasks may be compared with."""
    notes = []
    for task in tasks:
        for metric in task.metrics:
            fair = (
                "with the prompts of that code: comparable with its numbers at the same length "
                "(theirs are greedy, two tokens a step)"
                if task.protocol == "published"
                else "but on other prompts than that code's, so not comparable with its numbers "
                f"(--task-option {task.name}.protocol=published has its prompts)"
            )
            notes.append(
                f"{task.name}: Score is this project's, comparable with its other scores; "
                f"{metric.name} is the {metric.meaning}, {fair}."
            )
    return notes
