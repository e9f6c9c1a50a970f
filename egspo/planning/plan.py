"""``egspo plan``: what a step costs and needs, whether it fits, and what would make it fit.

Nothing is loaded or measured here: FLOPs and bytes come from sizes
(:mod:`egspo.planning.expected_work`, :mod:`egspo.planning.memory`), seconds only from rates
that the caller has measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from egspo.config import LoraConfig, TrainConfig
from egspo.config.recipe import load_config
from egspo.planning.dry_run import ASSUMED_PROMPT_TOKENS, DryRun, described_model, dry_run
from egspo.planning.expected_work import Shares, expected_work
from egspo.planning.memory import estimate_memory
from egspo.planning.memory_items import MemoryItem, peak_bytes
from egspo.planning.memory_sharded import SHARDED
from egspo.rollouts.work import ModelCost
from egspo.runs.metrics import read_metrics
from egspo.training.data_order import data_order

PHASES = ("rollout", "score", "update")

# Steps whose prompts are looked at, where prompts differ in length.
_STEPS = 4


class PlanError(ValueError):
    """There is no plan to make: the model, a share or a rate is not known."""


@dataclass(frozen=True)
class Plan:
    """A training step of one recipe on a number of GPUs."""

    flops: dict[str, int]
    """Of a step, by phase, on all GPUs together: what a run logs as ``flops/PHASE``."""
    memory: list[MemoryItem]
    """Of one GPU."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return peak_bytes(self.memory)


@dataclass(frozen=True)
class Suggestion:
    """A changed recipe, planned like the recipe itself."""

    changes: dict[str, Any]
    """Options by dotted name."""
    effect: str
    """What else they change."""
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """As on the command line."""
        return [f"{name}={json.dumps(value)}" for name, value in self.changes.items()]


class Planner:
    """Plans a recipe and its variants.

    Args:
        config: the recipe.
        gpus: processes, with an equal share of the sequences each.
        shares: what a run does of the most that the recipe allows.

    Raises:
        PlanError: the model is not known.
        ValueError: it has another objective than ``stepwise``, or there are more GPUs than
            sequences, or too few for the recipe's engine.
    """

    def __init__(self, config: TrainConfig, gpus: int, shares: Shares) -> None:
        if config.algorithm.objective != "stepwise":
            raise ValueError(
                "passes and memory are estimated for algorithm.objective: stepwise alone, got "
                f"{config.algorithm.objective}"
            )
        sequences = config.prompts_per_step * config.algorithm.group_size
        if not 1 <= gpus <= sequences:
            raise ValueError(
                f"gpus must be between 1 and the {sequences} sequences of a step "
                f"(prompts_per_step x algorithm.group_size), got {gpus}"
            )
        if gpus == 1 and config.distributed.engine in SHARDED:
            raise ValueError(
                f"distributed.engine: {config.distributed.engine} shards over processes: plan it "
                "with two GPUs or more"
            )
        self.config, self.gpus, self.shares = config, gpus, shares
        self.looked: DryRun = dry_run(config)
        if self.looked.model_config is None:
            problems = [f"{c.name}: {c.detail}" for c in self.looked.checks if c.status != "ok"]
            raise PlanError("the model is not known; " + "; ".join(problems))
        self._models: dict[str, nn.Module] = {}

    @cached_property
    def plan(self) -> Plan:
        """Of the recipe itself."""
        return self.of(self.config)

    def of(self, config: TrainConfig) -> Plan:
        """Of the recipe or a variant of it, with the same model and data."""
        model = self._model(config)
        each = replace(config, prompts_per_step=-(-config.prompts_per_step // self.gpus))
        return Plan(
            self._flops(each, model),
            estimate_memory(each, model, self.looked.prompt_tokens, self.gpus),
        )

    def _model(self, config: TrainConfig) -> nn.Module:
        key = repr(config.model)
        if key not in self._models:
            assert self.looked.model_config is not None
            self._models[key], _ = described_model(config, self.looked.model_config)
        return self._models[key]

    def _flops(self, each: TrainConfig, model: Any) -> dict[str, int]:
        cost = ModelCost.of(model)
        assert cost is not None
        lengths = self.looked.prompt_lengths or [ASSUMED_PROMPT_TOKENS]
        steps = _STEPS * self.gpus if len(set(lengths)) > 1 else 1
        total = dict.fromkeys(PHASES, 0)
        shift = int(getattr(model.config, "prediction_shift", 0))
        block_size = getattr(model.config, "block_size", None)
        for step in range(steps):
            count = each.prompts_per_step
            prompts = [lengths[i] for i in data_order(each.seed, len(lengths), step * count, count)]
            work = expected_work(each, prompts, shift, cost, block_size)
            for phase in PHASES:
                counted = cost.training if phase == "update" else cost.forward
                total[phase] += counted(work[phase])
        shares = {
            "rollout": 1 - self.shares.saved_steps,
            "score": self.shares.scored_states,
            "update": self.shares.trained_states,
        }
        processes = self.config.prompts_per_step / each.prompts_per_step
        return {name: round(total[name] * shares[name] / steps * processes) for name in PHASES}

    def suggestions(self, available: int) -> list[Suggestion]:
        """What brings the peak down to ``available`` bytes, or as far as it goes.

        Each option alone as far as it is needed, the ones that lower the peak; and where none is
        enough, the first ones together that are. They are in the order in which to try them: what
        only takes time first.
        """
        alone: list[Suggestion] = []
        together: list[tuple[dict[str, Any], str]] = []
        config, plan = self.config, self.plan
        for option in OPTIONS if self.gpus == 1 else (_shard, *OPTIONS):
            best = self._least(option(self.config), self.config, available)
            if best is not None and best.plan.peak < self.plan.peak:
                alone.append(best)
            if plan.peak <= available:
                continue
            added = self._least(option(config), config, available)
            if added is not None and added.plan.peak < plan.peak:
                together.append((added.changes, added.effect))
                config, plan = changed(config, added.changes), added.plan
        if len(together) > 1 and all(each.plan.peak > available for each in alone):
            alone.append(self._needed(together, available))
        return alone

    def _least(
        self, variants: Iterator[tuple[dict[str, Any], str]], config: TrainConfig, available: int
    ) -> Suggestion | None:
        """The first variant that fits, or the one with the lowest peak; the earlier of equals."""
        best: Suggestion | None = None
        for changes, effect in variants:
            found = Suggestion(changes, effect, self.of(changed(config, changes)))
            if best is None or found.plan.peak < best.plan.peak:
                best = found
            if found.plan.peak <= available:
                break
        return best

    def _needed(self, steps: list[tuple[dict[str, Any], str]], available: int) -> Suggestion:
        """``steps`` together, without those that it fits without."""

        def joined(kept: Sequence[tuple[dict[str, Any], str]]) -> Suggestion:
            changes = {name: value for step, _ in kept for name, value in step.items()}
            effects = "; ".join(dict.fromkeys(effect for _, effect in kept))
            return Suggestion(changes, effects, self.of(changed(self.config, changes)))

        found = joined(steps)
        for step in reversed(steps):  # what changes the training goes first
            without = [other for other in steps if other is not step]
            smaller = joined(without)
            if smaller.plan.peak <= available:
                steps, found = without, smaller
        return found


Variants = Iterator[tuple[dict[str, Any], str]]


def _checkpointing(config: TrainConfig) -> Variants:
    if not config.model.gradient_checkpointing:
        effect = "the backward pass computes the forward pass again"
        yield {"model.gradient_checkpointing": True}, effect


def _offload(config: TrainConfig) -> Variants:
    if not config.model.activation_offload:
        effect = "same gradient; activations go to host memory and back"
        yield {"model.activation_offload": True}, effect


def _micro_batch(config: TrainConfig) -> Variants:
    name = "size" if config.micro_batch_tokens is None else "tokens"
    value: int | None = getattr(config, f"micro_batch_{name}")
    assert value is not None
    while value > 1:
        value //= 2
        yield {f"micro_batch_{name}": value}, "same gradient, smaller matrix products"


def _rollout_batch(config: TrainConfig) -> Variants:
    size = config.generation.batch_size
    while size > 1:
        size //= 2
        yield {"generation.batch_size": size}, "same completions, smaller matrix products"


def _shard(config: TrainConfig) -> Variants:
    """For several GPUs."""
    possible = config.model.quantization == "none" and config.optimizer.name == "adamw"
    if config.distributed.engine not in SHARDED and possible and not config.generation.cuda_graphs:
        effect = "same gradient; a GPU keeps a part of what is trained"
        yield {"distributed.engine": "fsdp2"}, effect


def _no_cache(config: TrainConfig) -> Variants:
    if config.generation.cache != "none":
        yield {"generation.cache": "none"}, "another policy: full attention, more columns"


def _no_reference(config: TrainConfig) -> Variants:
    still: dict[str, Any] = {}
    if config.algorithm.reference_every is not None:
        still = {"algorithm.reference_blend": 1.0, "algorithm.reference_every": None}
        if config.model.has_adapter:
            yield still, "another objective: the KL goes to the base"
    if config.algorithm.beta > 0 and not config.model.has_adapter:
        yield {**still, "algorithm.beta": 0.0}, "another objective: no KL to a reference policy"


def _lora(config: TrainConfig) -> Variants:
    if not config.model.has_adapter:
        yield {"model.lora.rank": LoraConfig().rank}, "trains adapters, not all weights"
    rank = 0 if config.model.lora is None else config.model.lora.rank
    while rank > 8:
        rank //= 2
        yield {"model.lora.rank": rank}, "smaller adapters, scaled by alpha / rank"


OPTIONS: tuple[Callable[[TrainConfig], Variants], ...] = (
    _checkpointing,
    _micro_batch,
    _offload,
    _rollout_batch,
    _no_cache,
    _lora,
    _no_reference,
)
"""Each yields changes to a recipe, stronger and stronger, with what else they do."""


def changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """``config`` with options by dotted name."""
    result: Any = config
    for path, value in changes.items():
        result = _changed(result, path.split("."), value)
    assert isinstance(result, TrainConfig)
    return result


def _changed(section: Any, names: Sequence[str], value: Any) -> Any:
    name, *rest = names
    if rest:
        inner = getattr(section, name)
        value = _changed(LoraConfig() if inner is None else inner, rest, value)
    return replace(section, **{name: value})


def measured_shares(run: Path) -> Shares:
    """The means over a run's training steps.

    Raises:
        FileNotFoundError: ``run`` is not the folder of a run.
        PlanError: it has no training step.
    """
    records = [record for record in read_metrics(run) if record["step"] > 0]
    if not records:
        raise PlanError(f"{run} has no training step: nothing was measured")
    config = load_config(run / "config.yaml")
    sequences = config.prompts_per_step * config.algorithm.group_size
    most = sequences * config.ranks * len(records)
    scored = sum(record["selected/states"] for record in records)
    skipped = sum(record["skipped/states"] for record in records)
    saved = sum(record["rollout/saved"] for record in records) / len(records)
    return Shares(saved, scored / most, (scored - skipped) / most)


def read_rates(file: Path) -> dict[str, float]:
    """FLOP/s by phase: of a JSON object with TFLOP/s by phase, or measured by a run on one GPU.

    Args:
        file: ``{"rollout": ..., "score": ..., "update": ...}``; or a run's folder or its
            ``metrics.jsonl``, of which all training steps but the first count.

    Raises:
        FileNotFoundError: there is no such file.
        PlanError: a phase is missing or not a positive number. Of a run, phases without passes
            are left out.
    """
    if file.is_dir() or file.suffix == ".jsonl":
        records = [record for record in read_metrics(file) if record["step"] > 1]
        rates: dict[str, Any] = {}
        for phase in PHASES:
            seconds = sum(record[f"time/{phase}"] for record in records)
            flops = sum(record[f"flops/{phase}"] for record in records)
            if flops or not records:  # a run without a replay has no rate of one
                rates[phase] = flops / seconds if records and seconds else None
    else:
        try:
            found = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise PlanError(f"{file} is not JSON: {error}") from error
        found = found if isinstance(found, dict) else {}
        rates = {phase: found.get(phase) for phase in PHASES}
        rates = {p: r * 1e12 if isinstance(r, int | float) else None for p, r in rates.items()}
    for phase, rate in rates.items():
        if rate is None or not rate > 0:
            raise PlanError(f"{file} has no rate of the phase {phase!r}, expected TFLOP/s > 0")
    return rates
