"""Decode, score and record the samples of an evaluation that are not on disk yet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from egspo.config import GenerationConfig
from egspo.evaluations.metrics import metric_means, metric_notes
from egspo.evaluations.plan import (
    SAMPLES,
    EvaluationPlan,
    check_same,
    examples_of,
    identity,
    save_identity,
)
from egspo.evaluations.records import Record, SampleFile
from egspo.evaluations.summary import SummaryRow, summarise, write_summary
from egspo.rollouts.completion import Completion, completions_of
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import RolloutBlock, check_context, rollout_blocks
from egspo.rollouts.trajectory import PromptBatch
from egspo.tasks import Task
from egspo.tasks.prompts import PromptSet, prompt_set
from egspo.training.evaluation import score
from egspo.training.progress import RunProgress

logger = logging.getLogger("egspo")

# Sequences that one rollout holds: it keeps the trajectories of all.
_ROLLOUT = 4096
# Noise of further samples of a prompt is as far from that of other prompts as any task is long.
_SAMPLE_STRIDE = 1 << 32

Key = tuple[int, int]
"""Place of a prompt, and which of its completions."""


@dataclass(frozen=True)
class Cell:
    """One task at one length."""

    task: Task
    prompts: PromptSet
    generation: GenerationConfig
    file: SampleFile

    @property
    def name(self) -> str:
        return f"{self.task.name}, {self.generation.max_new_tokens} tokens"

    @property
    def metric(self) -> str:
        return "reward" if self.task.solved is None else "solved"


def run_evaluation(
    plan: EvaluationPlan,
    tasks: Mapping[str, Task],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    weights: Mapping[str, str | None],
    state: PartialState,
    notes: Sequence[str] = (),
    check: Callable[[], object] = lambda: None,
) -> list[SummaryRow]:
    """Evaluate; samples that an earlier run of the same evaluation finished are kept.

    ``plan.output`` gets ``evaluation.json``, ``samples/TASK-LENGTH.jsonl``, ``summary.json`` and
    ``summary.md``. Every process decodes its share; a sample is on disk as soon as it is scored.

    Args:
        tasks: those of the plan, by name.
        model: a masked diffusion model on its device, with or without adapter.
        tokenizer: with a chat template.
        name: of the model, as the summary says it.
        weights: see :func:`egspo.evaluations.plan.identity`.
        state: the processes.
        notes: for the summary.
        check: called before samples are written; raises where the folder is not ours any more.

    Returns:
        A row per task and length; in processes other than the main one as well.

    Raises:
        RewardError: the metric of a task failed. (A reward function that fails leaves its value
            out of the sample.)
        ValueError: a prompt does not fit the model, or the folder has the samples of an evaluation
            with another configuration or model.
    """
    denoiser = Denoiser.of(model, tokenizer)
    context = getattr(model.config, "max_sequence_length", None)
    cells = _cells(plan, tasks, tokenizer, context)
    content = check_same(plan, identity(plan, tasks, weights))
    state.wait_for_everyone()  # every process has looked at what the main one now changes
    if state.is_main_process:
        (plan.output / SAMPLES).mkdir(parents=True, exist_ok=True)
        save_identity(plan, content, name)
        for cell in cells:
            cell.file.join()
    state.wait_for_everyone()
    for cell in cells:
        todo = _missing(cell, plan.samples)
        share = todo[state.process_index :: state.num_processes]
        if share:
            _Evaluator(cell, denoiser, tokenizer, plan.seed, state, check).run(share)
    state.wait_for_everyone()
    if state.is_main_process:
        check()
        for cell in cells:
            cell.file.join()
    state.wait_for_everyone()
    rows = [_summary(cell, plan) for cell in cells]
    if state.is_main_process:
        write_summary(plan.output, rows, name, [*metric_notes(list(tasks.values())), *notes])
    return rows


def _cells(
    plan: EvaluationPlan,
    tasks: Mapping[str, Task],
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
) -> list[Cell]:
    """All tasks by all lengths; every prompt is tokenised now, so that a bad one fails now."""
    cells = []
    for name, task in tasks.items():
        if Path(name).name != name:
            raise ValueError(f"task {name!r} cannot be the name of a file")
        examples = examples_of(task, plan.split)[: plan.limit]
        try:
            prompts = prompt_set(examples, tokenizer)
            for generation in plan.generations:
                check_context(prompts.token_ids, generation, context)
                file = SampleFile(plan.output / SAMPLES, f"{name}-{generation.max_new_tokens}")
                cells.append(Cell(task, prompts, generation, file))
        except ValueError as error:
            raise ValueError(f"task {name}: {error}") from error
    return cells


def _missing(cell: Cell, samples: int) -> list[Key]:
    """Samples that are not on disk."""
    wanted = [(index, sample) for sample in range(samples) for index in range(len(cell.prompts))]
    done = {(record["index"], record["sample"]) for record in cell.file.read()}
    missing = [key for key in wanted if key not in done]
    if len(missing) < len(wanted):
        logger.info(
            "%s: %d of %d samples are there", cell.name, len(wanted) - len(missing), len(wanted)
        )
    return missing


def _summary(cell: Cell, plan: EvaluationPlan) -> SummaryRow:
    """Of the samples that the plan asks for; the file may have more."""
    records = [
        record
        for record in cell.file.read()
        if record["index"] < len(cell.prompts) and record["sample"] < plan.samples
    ]
    generation = cell.generation
    row = summarise(
        cell.task.name, cell.metric, generation.max_new_tokens, generation.steps, records
    )
    return replace(row, metrics=metric_means(cell.task, cell.prompts, records))


class _Evaluator:
    """Samples of a cell on one process: scored in a thread while the next block is denoised."""

    def __init__(
        self,
        cell: Cell,
        denoiser: Denoiser,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        state: PartialState,
        check: Callable[[], object],
    ) -> None:
        self.check = check
        self.cell, self.denoiser, self.tokenizer = cell, denoiser, tokenizer
        self.seed, self.state = seed, state
        self.scores: list[float] = []
        self.done = 0
        self.tokens = 0

    def run(self, keys: Sequence[Key]) -> None:
        """Decode, score and record ``keys``, of which there must be some."""
        bar = RunProgress(len(keys), self.cell.name, enabled=self.state.is_main_process)
        pending: list[Future[None]] = []
        self.start = time.perf_counter()
        with bar, ThreadPoolExecutor(1) as scoring:
            for first in range(0, len(keys), _ROLLOUT):
                chunk = keys[first : first + _ROLLOUT]
                for block in self._blocks(chunk):
                    finished = self._finished(block, chunk)
                    if finished:
                        pending.append(scoring.submit(self._record, finished, bar.update))
                    while pending and pending[0].done():
                        pending.pop(0).result()  # raises what the scoring raised
            for future in pending:
                future.result()

    def _blocks(self, keys: Sequence[Key]) -> Any:
        device = self.denoiser.device
        tokens = [self.cell.prompts.token_ids[index] for index, _ in keys]
        ids = [index + sample * _SAMPLE_STRIDE for index, sample in keys]
        return rollout_blocks(
            self.denoiser,
            PromptBatch.from_lists(tokens, self.denoiser.pad_id, device),
            self.cell.generation,
            seed=self.seed,
            sequence_ids=torch.tensor(ids, device=device),
        )

    def _finished(
        self, block: RolloutBlock, keys: Sequence[Key]
    ) -> list[tuple[Key, Completion, int]]:
        """The sequences that retired, each with its steps."""
        rows = block.finished
        if not rows:
            return []
        ended = block.ended
        places = [keys[row][0] for row in rows]
        completions = completions_of(ended, self.tokenizer, self.denoiser.eos_id, indices=places)
        steps = ended.steps.tolist()
        return [(keys[row], completions[i], steps[i]) for i, row in enumerate(rows)]

    def _record(
        self,
        finished: Sequence[tuple[Key, Completion, int]],
        update: Callable[[int, Mapping[str, float | None]], None],
    ) -> None:
        """Score, and write to disk; in the scoring thread."""
        cell = self.cell
        places = [index for (index, _), _, _ in finished]
        texts = [completion.text for _, completion, _ in finished]
        scores, errors = score(cell.task, cell.prompts, places, texts, on_error="skip")
        for error in errors:
            logger.warning("%s: %s", cell.name, error)
        records = [
            self._sample(key, completion, steps, named, errors)
            for (key, completion, steps), named in zip(finished, scores, strict=True)
        ]
        self.check()
        cell.file.append(self.state.process_index, records)
        self.done += len(records)
        self.tokens += sum(record["tokens"] for record in records)
        self.scores += [record["score"] for record in records if record["score"] is not None]
        shown = {"speed/tokens_per_second": self.tokens / (time.perf_counter() - self.start)}
        if self.scores:
            shown = {cell.metric: sum(self.scores) / len(self.scores), **shown}
        update(self.done, shown)

    def _sample(
        self,
        key: Key,
        completion: Completion,
        steps: int,
        named: Mapping[str, float],
        errors: Sequence[str],
    ) -> Record:
        cell, (index, sample) = self.cell, key
        rewards = {k: v for k, v in named.items() if k not in ("solved", "skipped")}
        record: Record = {
            "index": index,
            "sample": sample,
            "prompt": cell.prompts.examples[index].prompt,
            "completion": completion.text,
            "answer": cell.task.answer_in(completion.text, cell.prompts.examples[index].columns),
            "score": named.get(cell.metric),
            "rewards": rewards,
            "steps": steps,
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        # Errors name functions, not samples: those of the batch, where a reward is missing.
        failed = named["skipped"] or len(rewards) <= len(cell.task.rewards)
        return {**record, "errors": list(errors)} if failed and errors else record
