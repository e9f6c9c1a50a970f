"""A training run: the loop around :class:`egspo.iteration.Iteration`, with what must survive it."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from egspo.build import base_model, build_data, build_denoiser, check_data, fresh_model
from egspo.checkpoint import check_writable, find_checkpoint, publish, remove_partial
from egspo.config import TrainConfig
from egspo.continuation import check_continuation
from egspo.data_order import data_order
from egspo.evaluation import average, evaluate
from egspo.iteration import Iteration, Metrics
from egspo.metrics import MetricsWriter
from egspo.optimization import build_optimizer, build_scheduler
from egspo.plotting import plot_run
from egspo.progress import RunProgress
from egspo.recipe import config_to_dict, save_config
from egspo.state import TrainingState
from egspo.warm_start import save_model, warm_start

logger = logging.getLogger("egspo")

# Keeps the noise of sampled evaluation apart from training's.
_EVAL_STREAM = 0x6576616C


def train(config: TrainConfig, *, resume: Path | None = None) -> Path:
    """Train by ``config``; returns the folder of the trained model.

    ``config.output_dir`` gets ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``final/`` and
    ``curves.png``.

    Args:
        config: the run.
        resume: a checkpoint, or a run whose newest checkpoint to continue from.
    """
    return Trainer(config, resume=resume).run()


class Trainer:
    """Builds the parts of a run and drives them; see :func:`train`."""

    def __init__(self, config: TrainConfig, *, resume: Path | None = None) -> None:
        self.config, self.output = config, Path(config.output_dir)
        # Precision is the denoiser's business, in rollout, scoring and update alike.
        self.accelerator = Accelerator(
            mixed_precision="no",
            log_with=list(config.trackers) or None,
            project_dir=config.output_dir,
        )
        self._check_processes()
        check_writable(self.output, 0)
        checkpoint = None if resume is None else find_checkpoint(resume)
        if checkpoint is not None:
            check_continuation(config, checkpoint.parent.parent)

        self.data = build_data(config)
        with self.accelerator.main_process_first():
            base = self._base()
        check_data(config, self.data, getattr(base.config, "max_sequence_length", None))
        self.denoiser = build_denoiser(config, base, self.data.tokenizer)
        model = self.denoiser.model
        self._check_disk()
        optimizer = build_optimizer(model, config.optimizer)
        scheduler = build_scheduler(optimizer, config.optimizer, config.steps)
        self.state = TrainingState(model, optimizer, scheduler, self._write_model)
        self.iteration = Iteration(
            config, self.data, self.denoiser, optimizer, self._reduce_gradients
        )
        self.resumed = checkpoint is not None
        self.completed = 0 if checkpoint is None else self.state.load(checkpoint)

    def run(self) -> Path:
        """Train to ``config.steps``; on an error or interrupt the intact state is saved first."""
        config, main = self.config, self.accelerator.is_main_process
        if main:
            remove_partial(self.output)
            remove_partial(self._checkpoints)
            save_config(config, self.output / "config.yaml")
        self.accelerator.init_trackers("egspo", config=_flat(config_to_dict(config)))
        writer = MetricsWriter(
            self.output / "metrics.jsonl" if main else None,
            resume_after=self.completed if self.resumed else None,
        )
        try:
            with RunProgress(config.steps, "EGSPO", start=self.completed, enabled=main) as progress:
                if not self.resumed:
                    self._log({"step": 0, **self._evaluate()}, writer, progress)
                for step in range(self.completed + 1, config.steps + 1):
                    self._log(self._step(step), writer, progress)
                    self.completed = step
                    self.iteration.updated = False
                    if config.checkpoint.every and step % config.checkpoint.every == 0:
                        self._save()
        except BaseException:
            # Halfway through an update the weights belong to no step; otherwise they are intact.
            if self.completed and not self.iteration.updated:
                self._save()
            raise
        return self._finish()

    def _step(self, step: int) -> Metrics:
        """One iteration, the evaluation that is due, and what to log of both."""
        config, rank = self.config, self.accelerator.process_index
        share = config.prompts_per_step // self.accelerator.num_processes
        first = (step - 1) * config.prompts_per_step + rank * share
        prompts = data_order(config.seed, len(self.data.train), first, share)
        start = time.perf_counter()
        metrics = self.iteration.run(step, prompts, first * config.algorithm.group_size)
        metrics["lr"] = self.state.scheduler.get_last_lr()[0]
        self.state.scheduler.step()
        metrics = _merge(gather_object([metrics]))
        if step == config.steps or (config.eval.every and step % config.eval.every == 0):
            metrics.update(self._evaluate())
        metrics["time/step"] = time.perf_counter() - start
        return {"step": step, **metrics}

    def _evaluate(self) -> Metrics:
        """Held-out metrics, each process decoding its share of the prompts."""
        start = time.perf_counter()
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        records = evaluate(
            self.denoiser,
            self.data.tokenizer,
            self.data.task,
            self.data.test,
            self.config.generation,
            temperature=self.config.eval.temperature,
            seed=self.config.seed ^ _EVAL_STREAM,
            index=range(rank, len(self.data.test), processes),
        )
        means = average(gather_object(records))
        metrics = {f"eval/{name}": value for name, value in means.items()}
        return {**metrics, "time/eval": time.perf_counter() - start}

    def _log(self, record: Metrics, writer: MetricsWriter, progress: RunProgress) -> None:
        writer.write(record)
        scalars = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        self.accelerator.log(scalars, step=record["step"])
        shown = (
            "reward/mean",
            "eval/reward",
            "eval/solved",
            "entropy/mean",
            "speed/tokens_per_second",
        )
        progress.update(record["step"], {k: record[k] for k in shown if k in record})

    @property
    def _checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            keep = self.config.checkpoint.keep_last
            self.state.save(self._checkpoints, self.completed, keep_last=keep)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> Path:
        final = self.output / "final"
        if self.accelerator.is_main_process:
            keep = self.config.checkpoint.keep_last
            self.state.save(self._checkpoints, self.completed, keep_last=keep)
            publish(final, self._write_model)
            plot_run(self.output, self.output / "curves.png")
        self.accelerator.end_training()
        return final

    def _write_model(self, folder: Path) -> None:
        save_model(self.denoiser.model, self.data.tokenizer, self.config.generation, folder)

    def _base(self) -> PreTrainedModel:
        """The model RL starts from, which is also the reference policy."""
        config, device = self.config.model, self.accelerator.device
        if config.path is not None:
            return base_model(config, config.path, device)
        if self.config.sft is None:
            return fresh_model(config, self.data.tokenizer, self.config.seed, device)
        folder = warm_start(self.config, self.data, device)
        return base_model(config, str(folder), device)

    def _reduce_gradients(self, has_gradient: bool) -> bool:
        """Average gradients over processes; False if no process has any.

        Every process calls this once per optimizer step, whatever work it had, so that unequal
        work cannot hang.
        """
        if self.accelerator.num_processes == 1:
            return has_gradient
        if not any(gather_object([has_gradient])):
            return False
        for parameter in self.denoiser.model.parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                gradient = torch.zeros_like(parameter) if gradient is None else gradient
                parameter.grad = self.accelerator.reduce(gradient, reduction="mean")
        return True

    def _check_processes(self) -> None:
        kind = str(self.accelerator.distributed_type).rpartition(".")[2]
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise ValueError(
                f"accelerate is configured for {kind}: this version trains on one process or "
                "data-parallel on several, each with a whole model"
            )
        processes = self.accelerator.num_processes
        if self.config.prompts_per_step % processes:
            raise ValueError(
                f"prompts_per_step ({self.config.prompts_per_step}) must be a multiple of the "
                f"{processes} processes"
            )

    def _check_disk(self) -> None:
        """Room for the checkpoints: weights and two moments of what is trained, in float32."""
        trained = sum(p.numel() for p in self.denoiser.model.parameters() if p.requires_grad)
        check_writable(self.output, 12 * trained * (self.config.checkpoint.keep_last + 2))


def _merge(records: list[Metrics]) -> Metrics:
    """Metrics of all processes: histograms and counts add up, the rest is averaged."""
    merged: Metrics = {}
    for name in {name: None for record in records for name in record}:
        values = [record[name] for record in records if record.get(name) is not None]
        if not values:
            merged[name] = None
        elif isinstance(values[0], list):
            merged[name] = [sum(column) for column in zip(*values, strict=True)]
        elif len(values) == 1:
            merged[name] = values[0]
        elif isinstance(values[0], int) or name.startswith("speed/"):
            merged[name] = sum(values)
        elif name.endswith(("/max", "/drift")) or name.startswith("time/"):
            merged[name] = max(values)
        else:
            merged[name] = sum(values) / len(values)
    return merged


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested configuration as dotted names, as trackers want it."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, int | float | str) else str(value)
    return flat
