"""``egspo train RECIPE --dry-run``: what can be known of a run without loading or writing weights.

Each check fails, passes, or could not be made and says why: data and models on the hub cannot be
looked at offline. A model is known by its ``config.json`` alone, so a folder with that and the
tokenizer's files is enough for ``model.path``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from egspo.config import TrainConfig
from egspo.engines.processes import world_size
from egspo.models import load_config, model_on_meta, new_config, special_token_ids
from egspo.models.experts import routed_layers
from egspo.models.lora_experts import stacked_targets, targets_experts
from egspo.models.published import published_config
from egspo.planning.hub import asked_once, is_unreachable
from egspo.planning.memory import estimate_memory
from egspo.planning.memory_items import MemoryItem, peak_bytes
from egspo.rollouts.engine import check_context
from egspo.tasks import Task
from egspo.tasks.prompts import (
    Data,
    build_tokenizer,
    check_task,
    recipe_task,
    supervised_examples,
    tokenised,
)
from egspo.training.build import (
    check_data,
    check_model,
    check_trackers,
    fresh_fields,
    trainable_model,
    weights_dtype,
)
from egspo.training.sft import encode_targets

T = TypeVar("T")
Status = Literal["ok", "failed", "not checked"]

# Of the estimate, where no prompt could be tokenised.
ASSUMED_PROMPT_TOKENS = 256


class DryRunError(ValueError):
    """A dry run found what would stop the run."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    detail: str


@dataclass
class DryRun:
    """What a dry run found."""

    checks: list[Check] = field(default_factory=list)
    memory: list[MemoryItem] = field(default_factory=list)
    """Of one process on a GPU; empty where the model is not known."""
    prompt_tokens: int = ASSUMED_PROMPT_TOKENS
    prompts_known: bool = False
    prompt_lengths: list[int] = field(default_factory=list)
    """Tokens of every training prompt; empty where they are not known."""
    model_config: PretrainedConfig | None = None
    notes: list[str] = field(default_factory=list)
    """What had to do in the place of what could not be looked at."""

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == "failed"]


def dry_run(config: TrainConfig) -> DryRun:
    """Look at everything a run of ``config`` needs; loads no weights and writes nothing."""
    model = config.model
    with asked_once((model.path, model.tokenizer, model.adapter)) as why:
        report = _Report(why is not None)
        if why is not None:
            report.skip("hub", f"cannot be reached, only its cache was looked at ({why})")
        _look(config, report)
    return report.found


def _look(config: TrainConfig, report: _Report) -> None:
    """All checks, in the order in which they need each other."""
    report.check("trackers", lambda: _trackers(config))
    report.check("sampling", lambda: _sampling(config))
    task = report.check("task", lambda: _task(config))
    tokenizer = None
    if task is None and config.model.path is None and config.model.tokenizer is None:
        report.skip("tokenizer", "needs the task, whose characters it knows")
    else:
        tokenizer = report.check("tokenizer", lambda: _tokenizer(config, task))
    data = None
    if task is not None and tokenizer is not None:
        data = report.check("prompts", lambda: _prompts(config, task, tokenizer, report.found))
    else:
        report.skip("prompts", "needs the tokenizer and the task")
    if config.sft is not None and data is not None:
        report.check("sft", lambda: _sft(config, data))
    model_config = None
    if tokenizer is None and config.model.path is None:
        report.skip("model", "needs the tokenizer, which decides its vocabulary")
    else:
        model_config = report.check("model", lambda: _model_config(config, tokenizer, report.found))
    if model_config is None:
        report.skip("context", "needs the model's configuration")
        return
    if tokenizer is not None:
        report.check("special tokens", lambda: _special_tokens(tokenizer, model_config))
    report.check("context", lambda: _context(config, data, model_config))
    model = report.check("weights", lambda: described_model(config, model_config))
    if model is not None:
        found = report.found
        found.model_config = model_config
        found.memory = estimate_memory(config, model, found.prompt_tokens, world_size())


class _Report:
    """Runs checks, and keeps what they find.

    Args:
        offline: whether it is known already that the hub cannot be reached.
    """

    def __init__(self, offline: bool) -> None:
        self.offline, self.found = offline, DryRun()

    def check(self, name: str, look: Callable[[], tuple[T, str]]) -> T | None:
        """What ``look`` gives, with a detail to show; None where it raised."""
        try:
            result, detail = look()
        except Exception as error:
            if not _is_expected(error):
                raise
            unreachable = is_unreachable(error)
            status: Status = "not checked" if unreachable else "failed"
            said = unreachable and self.offline
            detail = "needs the hub" if said else _one_line(error)
            self.found.checks.append(Check(name, status, detail))
            return None
        self.found.checks.append(Check(name, "ok", detail))
        return result

    def skip(self, name: str, why: str) -> None:
        self.found.checks.append(Check(name, "not checked", why))


def _is_expected(error: Exception) -> bool:
    """Whether the message alone says what is wrong; anything else is a defect, with traceback."""
    own = type(error).__module__.partition(".")[0] == "egspo"
    return own or isinstance(error, ValueError | TypeError | OSError | ImportError)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _trackers(config: TrainConfig) -> tuple[None, str]:
    check_trackers(config)
    return None, ", ".join(config.trackers) or "none"


def _sampling(config: TrainConfig) -> tuple[None, str]:
    generation, algorithm = config.generation, config.algorithm
    group = config.prompts_per_step * algorithm.group_size
    at_once = config.micro_batch_size or f"{config.micro_batch_tokens:,} columns of them"
    return None, (
        f"{group} completions of {generation.max_new_tokens} tokens a step, in {generation.steps} "
        f"denoising steps, {algorithm.selected_steps} of them trained: up to "
        f"{group * algorithm.selected_steps} states, {at_once} at a time"
    )


def _tokenizer(config: TrainConfig, task: Task | None) -> tuple[PreTrainedTokenizerBase, str]:
    tokenizer = build_tokenizer(config.model, None if task is None else task.characters)
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template")
    source = tokenizer.name_or_path or "characters"
    return tokenizer, f"{source}, {len(tokenizer):,} tokens"


def _task(config: TrainConfig) -> tuple[Task, str]:
    task = recipe_task(config.task)
    check_task(config, task)
    rewards = ", ".join(f"{reward.name} x {reward.weight:g}" for reward in task.rewards)
    columns = ", ".join(task.train[0].columns) or "none"
    splits = (("training", task.train), ("validation", task.validation), ("test", task.test))
    counts = ", ".join(f"{len(examples):,} {name}" for name, examples in splits) + " examples"
    return task, f"{task.name}: {counts}; columns {columns}; rewards {rewards}"


def _prompts(
    config: TrainConfig, task: Task, tokenizer: PreTrainedTokenizerBase, found: DryRun
) -> tuple[Data, str]:
    data = tokenised(config, task, tokenizer)
    lengths = [len(ids) for ids in (*data.train.token_ids, *data.held_out.token_ids)]
    found.prompt_tokens, found.prompts_known = max(lengths), True
    found.prompt_lengths = [len(ids) for ids in data.train.token_ids]
    mean = sum(lengths) / len(lengths)
    return data, f"{min(lengths)} to {max(lengths)} tokens, {mean:.0f} on average"


def _sft(config: TrainConfig, data: Data) -> tuple[None, str]:
    examples = supervised_examples(config, data)
    rows = encode_targets(data.tokenizer, examples, config.generation.max_new_tokens)
    return None, f"{len(rows):,} reference completions of up to {max(map(len, rows))} tokens"


def _model_config(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None, found: DryRun
) -> tuple[PretrainedConfig, str]:
    if config.model.path is not None:
        source = config.model.path
        try:
            read = load_config(source)
        except FileNotFoundError as error:
            known = published_config(source) if is_unreachable(error) else None
            if known is None:
                raise
            text = f"{source}: {known.model_type}, by its published sizes"
            found.notes.append(f"The hub cannot be reached; {text}.")
            return known, text
    else:
        assert tokenizer is not None
        read, source = new_config(fresh_fields(config.model, tokenizer)), "a new model"
    return read, f"{source}: {read.model_type}"


def _special_tokens(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> tuple[None, str]:
    tokens = special_token_ids(tokenizer, config)
    return None, f"mask {tokens.mask}, EOS {tokens.eos}, padding {tokens.pad}"


def _context(
    config: TrainConfig, data: Data | None, model_config: PretrainedConfig
) -> tuple[None, str]:
    context, length = model_config.max_sequence_length, config.generation.max_new_tokens
    check_model(config, model_config)
    if data is None:
        check_context([[]], config.generation, context)
        return None, f"{length} new tokens fit {context:,}; the prompts are not known"
    check_data(config, data, model_config)
    return None, f"prompts and {length} new tokens fit {context:,}"


def described_model(config: TrainConfig, model_config: PretrainedConfig) -> tuple[nn.Module, str]:
    """The model to train, on the meta device in its dtype on a GPU; and its sizes in words."""
    base = model_on_meta(model_config)
    nn.Module.to(base, weights_dtype(config.model, torch.device("cuda")))
    total = base.num_parameters()
    model: Any = base
    with torch.device("meta"):  # of the adapter too
        if config.model.adapter is None:
            model = trainable_model(config.model, base, config.seed)
        else:
            if config.model.gradient_checkpointing:
                base.checkpoint_activations()
            adapter = PeftConfig.from_pretrained(config.model.adapter)
            if isinstance(adapter, LoraConfig) and routed_layers(base) and targets_experts(adapter):
                stacked_targets(adapter, base)
            model = PeftModel(base, adapter)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".lora_" in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    detail = f"{total:,} parameters in {str(base.dtype)[6:]}, {trained:,} trained"
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    if adapted:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in adapted)
        detail += f" in adapters on {len(adapted)} modules ({', '.join(kinds)})"
    elif isinstance(model, PeftModel):
        raise ValueError(f"the adapter {config.model.adapter} matches no module of the model")
    return model, detail


def print_report(report: DryRun, console: Console) -> None:
    """Show what a dry run found as tables."""
    colours = {"ok": "green", "failed": "red", "not checked": "yellow"}
    checks = Table("check", "result", "detail", title="Dry run", title_justify="left")
    for check in report.checks:
        result = f"[{colours[check.status]}]{check.status}[/]"
        checks.add_row(check.name, result, escape(check.detail))
    console.print(checks)
    if not report.memory:
        console.print("Memory: not estimated, the model is not known.")
        return
    console.print(memory_table(report.memory, report))


def memory_table(items: Sequence[MemoryItem], report: DryRun) -> Table:
    """The parts of an estimate and their peak; ``report`` says what is known of the prompts."""
    prompts = "the longest prompt" if report.prompts_known else "an assumed prompt"
    title = f"Memory of one process on a GPU, {prompts} of {report.prompt_tokens} tokens"
    memory = Table("part", "when", title=title, title_justify="left")
    memory.add_column("bytes", justify="right", no_wrap=True)
    memory.add_column("GiB", justify="right", no_wrap=True)
    memory.add_column("formula")
    for item in items:
        style = "dim" if item.phase in ("instead", "host") else None
        amounts = (f"{item.bytes:,}", f"{item.bytes / 2**30:.2f}")
        memory.add_row(item.name, item.phase, *amounts, item.formula, style=style)
    peak = peak_bytes(items)
    memory.add_section()
    text = "always + the larger of rollout and update"
    memory.add_row("peak", "", f"{peak:,}", f"{peak / 2**30:.2f}", text, style="bold")
    return memory
