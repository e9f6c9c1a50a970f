"""What an evaluation does, and whether it goes on with what an earlier one began."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from egspo import __version__
from egspo.config import GenerationConfig, TaskConfig
from egspo.files import replacing
from egspo.serving.named_model import GENERATION_FILE
from egspo.tasks import Example, Task
from egspo.training.continuation import flat

PLAN_FILE = "evaluation.json"
SAMPLES = "samples"
_ELSEWHERE = "Give another --output-dir, or --overwrite to start over (the old folder is renamed)."
Split = Literal["test", "validation"]

# May differ between two runs of one evaluation: what they change is only the speed.
_FREE_GENERATION = ("batch_size", "cuda_graphs")
# Sections of which a later run may have others.
_BY_CHOICE = ("tasks", "steps")
_WEIGHT_FILES = (".safetensors", ".bin", ".json", ".jinja")
_CHUNKS, _CHUNK_BYTES = 64, 65536


@dataclass(frozen=True)
class EvaluationPlan:
    """Tasks by lengths, for one model."""

    tasks: Sequence[TaskConfig]
    generations: Sequence[GenerationConfig]
    """One per length, that differ in ``max_new_tokens`` and ``steps`` only."""
    output: Path
    """Folder of the samples and the summary."""
    split: Split = "test"
    limit: int | None = None
    """At most so many prompts of each task, the first ones; None for all."""
    samples: int = 1
    """Completions of each prompt; their mean is pass@1."""
    seed: int = 0
    """Of the sampling noise. A completion's own noise is a function of it and the sample."""

    def __post_init__(self) -> None:
        if not self.tasks or not self.generations:
            raise ValueError("an evaluation needs at least one task and one length")
        for what, names in (
            ("task", [task.name for task in self.tasks]),
            ("length", [str(g.max_new_tokens) for g in self.generations]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what} {', '.join(twice)} is named twice")
        for option, value in (("limit", self.limit), ("samples", self.samples)):
            if value is not None and value < 1:
                raise ValueError(f"{option} must be >= 1, got {value}")
        if self.samples > 1 and any(g.temperature == 0 for g in self.generations):
            raise ValueError(
                f"samples={self.samples} needs a temperature above 0: greedy completions of one "
                "prompt are all the same"
            )


def load_task(config: TaskConfig) -> Task:
    """The task as ``config`` has it; raises as :func:`egspo.tasks.build_task`."""
    from egspo.tasks.prompts import recipe_task

    task = recipe_task(config)
    for reward in task.rewards:
        if reward.name in ("reward", "solved", "skipped"):
            raise ValueError(f"task {task.name}: a reward may not be called {reward.name!r}")
    return task


def examples_of(task: Task, split: Split) -> Sequence[Example]:
    """The whole split.

    Raises:
        ValueError: the task has no such split.
    """
    examples = task.test if split == "test" else task.validation
    if not examples:
        raise ValueError(f"task {task.name} has no {split} split")
    return examples


def identity(
    plan: EvaluationPlan, tasks: Mapping[str, Task], weights: Mapping[str, str | None]
) -> dict[str, Any]:
    """All that the scores depend on, but for the choice of tasks, lengths, prompts and samples.

    Args:
        plan: the evaluation.
        tasks: those of the plan, by name.
        weights: what :func:`fingerprint` says, by ``model`` and ``adapter``.
    """
    first = asdict(plan.generations[0])
    for name in ("max_new_tokens", "steps", *_FREE_GENERATION):
        del first[name]
    return {
        "weights": dict(weights),
        "decoding": first,
        "steps": {str(g.max_new_tokens): g.steps for g in plan.generations},
        "split": plan.split,
        "seed": plan.seed,
        "tasks": {
            config.name: {
                "options": config.options,
                "reward_weights": config.reward_weights,
                "file": None if config.file is None else _digest(Path(config.file).expanduser()),
                "prompts": _prompts_digest(examples_of(tasks[config.name], plan.split)),
            }
            for config in plan.tasks
        },
    }


def check_same(plan: EvaluationPlan, new: Mapping[str, Any]) -> dict[str, Any]:
    """``new`` with the tasks and lengths that an earlier evaluation in ``plan.output`` has besides.

    Raises:
        ValueError: naming everything in which that one differs.
    """
    file = plan.output / PLAN_FILE
    if not file.is_file():
        if any((plan.output / SAMPLES).glob("*.jsonl")):
            raise ValueError(
                f"{plan.output / SAMPLES} has samples, and no {PLAN_FILE} says of which evaluation "
                f"they are. {_ELSEWHERE}"
            )
        return dict(new)
    saved = _saved_identity(file)
    plain = json.loads(json.dumps(new))
    before, now = flat(_common(saved, plain)), flat(_common(plain, saved))
    changed = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        listed = "".join(f"\n  - {change}" for change in changed)
        raise ValueError(
            f"{plan.output} has the samples of another evaluation:{listed}\n{_ELSEWHERE}"
        )
    return {**plain, **{name: {**saved[name], **plain[name]} for name in _BY_CHOICE}}


def _saved_identity(file: Path) -> dict[str, Any]:
    """What :func:`save_identity` wrote; raises ValueError where it is damaged."""
    try:
        identity = json.loads(file.read_text("utf-8"))["identity"]
        if not all(isinstance(identity[name], dict) for name in _BY_CHOICE):
            raise ValueError(f"{' and '.join(_BY_CHOICE)} are no sections")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): it does not say of which "
            f"evaluation the samples beside it are. {_ELSEWHERE}"
        ) from error
    return dict(identity)


def _common(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """``one`` with those tasks and lengths only that ``other`` has too."""
    chosen = {name: {k: v for k, v in one[name].items() if k in other[name]} for name in _BY_CHOICE}
    return {**one, **chosen}


def save_identity(plan: EvaluationPlan, content: Mapping[str, Any], model: str) -> None:
    """Write :data:`PLAN_FILE`; ``model`` says in words what is evaluated."""
    text = json.dumps({"egspo": __version__, "model": model, "identity": content}, indent=1)
    with replacing(plan.output / PLAN_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fingerprint(where: str | None) -> str | None:
    """What tells the weights at ``where`` from others.

    Of a folder: names, sizes and 64 evenly spread pieces of the files of weights, configuration and
    tokenizer. Of a name on the hub: the commit in the cache, once the weights are loaded.
    """
    if where is None:
        return None
    folder = Path(where)
    if not folder.is_dir():
        return _hub_commit(where)
    state = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        # Decoding options are compared by name.
        if file.suffix not in _WEIGHT_FILES or file.name == GENERATION_FILE:
            continue
        size = file.stat().st_size
        state.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in sorted({size * chunk // _CHUNKS for chunk in range(_CHUNKS)}):
                stream.seek(start)
                state.update(stream.read(_CHUNK_BYTES))
    return state.hexdigest()[:16]


def _hub_commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        path = try_to_load_from_cache(name, file)
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _prompts_digest(examples: Sequence[Example]) -> str:
    """Of the whole split, whatever the limit: prompts, and the columns that decide the score."""
    state = hashlib.sha256()
    for example in examples:
        content: list[Any] = [example.prompt, example.columns]
        content += [example.prefill] if example.prefill else []
        text = json.dumps(content, sort_keys=True, default=lambda value: type(value).__name__)
        state.update(text.encode())
    return f"{len(examples)} prompts, {state.hexdigest()[:16]}"
