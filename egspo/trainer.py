"""A training run: the loop around :class:`egspo.iteration.Iteration`, with what must survive it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from egspo.best import BestSoFar
from egspo.build import (
    base_model,
    build_data,
    build_denoiser,
    check_data,
    check_trackers,
    fresh_model,
)
from egspo.checkpoint import (
    CHECKPOINTS,
    check_unclaimed,
    check_writable,
    find_checkpoint,
    publish,
    remove_later,
    remove_partial,
)
from egspo.config import TrainConfig
from egspo.continuation import check_continuation, flat
from egspo.data_order import data_order
from egspo.evaluation import average, evaluate
from egspo.graphs import check_device
from egspo.iteration import Iteration, Metrics
from egspo.metrics import MetricsWriter, read_metrics
from egspo.optimization import NonFiniteError, advance, build_optimizer, build_scheduler
from egspo.plotting import plot_run
from egspo.progress import RunProgress
from egspo.quantization import check_quantization
from egspo.recipe import config_to_dict, save_config
from egspo.reduction import merge
from egspo.reference import ReferenceRefresh
from egspo.sample_table import SampleTable
from egspo.samples import carry_samples, write_group
from egspo.state import WEIGHTS, TrainingState, termination_raises, trained_bytes
from egspo.warm_start import kept_base, needs_base, save_model, warm_start

logger = logging.getLogger("egspo")

# Keeps the noise of sampled evaluation apart from training's.
_EVAL_STREAM = 0x6576616C


def train(config: TrainConfig, *, resume: Path | None = None) -> Path:
    """Train by ``config``; returns the folder of the trained model.

    ``config.output_dir`` gets ``config.yaml``, ``metrics.jsonl``, ``samples/``, ``samples.html``,
    ``checkpoints/``, ``final/`` and ``curves.png``, and ``base/`` where a new model gets an adapter
    or has a reference policy. An error, interrupt or SIGTERM ends the run with a checkpoint of the
    last whole step, unless it comes in the middle of an update; what kills at once leaves the last
    one made.

    Args:
        config: the run.
        resume: a checkpoint, or a run whose newest checkpoint to continue from.

    Raises:
        CheckpointError: ``resume`` is damaged, or not of a run with this configuration; or
            ``output_dir`` has another run's checkpoints.
        NonFiniteError: on a NaN or infinite loss or gradient, before the weights take it.
        OSError: ``output_dir`` or the warm-start cache cannot be written, or a disk is too full.
        RewardError: a reward function failed, and ``task.on_reward_error`` is ``raise``.
        ValueError: data, model and configuration do not fit together.
    """
    return Trainer(config, resume=resume).run()


class Trainer:
    """Builds the parts of a run and drives them; see :func:`train`."""

    def __init__(self, config: TrainConfig, *, resume: Path | None = None) -> None:
        self.config, self.output = config, Path(config.output_dir)
        check_trackers(config)
        # Precision is the denoiser's business, in rollout, scoring and update alike.
        self.accelerator = Accelerator(
            mixed_precision="no",
            # Started by torchrun on CPUs, it would otherwise see one process.
            cpu=_world_size() > 1 and not torch.cuda.is_available(),
            log_with=list(config.trackers) or None,
            project_dir=config.output_dir,
        )
        self._check_processes()
        check_quantization(config, self.accelerator.device)
        if config.generation.cuda_graphs:
            check_device(self.accelerator.device)
        check_writable(self.output, 0)
        checkpoint = None if resume is None else find_checkpoint(resume)
        check_unclaimed(self._checkpoints, checkpoint)
        if checkpoint is not None:
            check_continuation(config, checkpoint.parent.parent, "train")

        self.resumed = None if checkpoint is None else checkpoint.parent.parent
        self.data = build_data(config)
        with self.accelerator.main_process_first():
            base = self._base()
        check_data(config, self.data, getattr(base.config, "max_sequence_length", None))
        self.denoiser = build_denoiser(config, base, self.data.tokenizer)
        self.reference = ReferenceRefresh(config.algorithm, self.denoiser)
        model = self.denoiser.model
        # Enough for the checkpoints, one being written, and the final model.
        copies = config.checkpoint.keep_last + config.checkpoint.keep_best + 2
        needed = trained_bytes(model, copies) + copies * self.reference.bytes
        check_writable(self.output, needed)
        optimizer = build_optimizer(model, config.optimizer)
        scheduler = build_scheduler(optimizer, config.optimizer, config.steps)
        self.state = TrainingState("train", model, optimizer, scheduler, self._write_state)
        self.iteration = Iteration(
            config, self.data, self.denoiser, optimizer, self._reduce_gradients
        )
        self.completed = 0
        if checkpoint is not None:
            self.completed = self.state.load(checkpoint, "steps", config.steps)
            self.reference.load(checkpoint, self.completed)
        self.best = BestSoFar()
        if self.resumed is not None and (self.resumed / "metrics.jsonl").exists():
            made = read_metrics(self.resumed)
            self.best = BestSoFar.of(r for r in made if r["step"] <= self.completed)
        self._between_steps = True
        self._table: SampleTable | None = None  # of the main process, once the trackers are there

    def run(self) -> Path:
        """Train to ``config.steps``; on an error or interrupt the intact state is saved first."""
        config, main = self.config, self.accelerator.is_main_process
        if main:
            remove_partial(self.output)
            remove_partial(self._checkpoints)
            remove_later(self._checkpoints, self.completed)
            save_config(config, self.output / "config.yaml")
        options = flat(config_to_dict(config))
        self.accelerator.init_trackers(
            "egspo",
            config={k: v if isinstance(v, int | float) else str(v) for k, v in options.items()},
        )
        if main:
            if self.resumed is not None:
                carry_samples(self.resumed, self.output, self.completed)
            trackers = self.accelerator.trackers
            self._table = SampleTable(self.output, trackers, completed=self.completed)
        writer = MetricsWriter(
            self.output / "metrics.jsonl" if main else None,
            resume_after=self.completed if self.resumed else None,
            history=self.resumed and self.resumed / "metrics.jsonl",
        )
        try:
            with (
                RunProgress(config.steps, "EGSPO", start=self.completed, enabled=main) as progress,
                termination_raises(),
            ):
                if not self.resumed:
                    self._log({"step": 0, **self._evaluate()}, writer, progress)
                for step in range(self.completed + 1, config.steps + 1):
                    if self._is_hopeless():
                        break
                    improved = self._log(self._step(step), writer, progress)
                    self.completed, self._between_steps = step, True
                    self.iteration.updated = False
                    due = config.checkpoint.every and step % config.checkpoint.every == 0
                    if due or (improved and config.checkpoint.keep_best):
                        self._save()
        except BaseException:
            # Halfway through an update the weights belong to no step; otherwise they are intact.
            if self.completed and self._between_steps and not self.iteration.updated:
                try:
                    self._save()
                except (OSError, NonFiniteError) as error:  # must not hide what ended the run
                    logger.error("step %d could not be saved: %s", self.completed, error)
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
        self._between_steps = False
        advance(self.state.scheduler)
        self.reference.after(step)
        metrics = merge(gather_object([metrics]))
        if config.evaluates_at(step):
            if self._table is not None:
                write_group(self.output, step, self.iteration.group)
                self._table.add(step, self.iteration.group)
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
            self.data.held_out,
            self.config.generation,
            temperature=self.config.eval.temperature,
            seed=self.config.seed ^ _EVAL_STREAM,
            index=range(rank, len(self.data.held_out), processes),
            on_error=self.config.task.on_reward_error,
        )
        means = average(gather_object(records))
        metrics = {f"eval/{name}": value for name, value in means.items()}
        return {**metrics, "time/eval": time.perf_counter() - start}

    def _is_hopeless(self) -> bool:
        """Whether ``eval.patience`` is at its end."""
        patience = self.config.eval.patience
        if patience is None or self.best.stale < patience:
            return False
        logger.info(
            "stopping after step %d: no better held-out reward than %.4f of step %s in %d "
            "evaluations (eval.patience)",
            *(self.completed, self.best.reward, self.best.step, self.best.stale),
        )
        return True

    def _log(self, record: Metrics, writer: MetricsWriter, progress: RunProgress) -> bool:
        """Record a step; whether its held-out reward is the best so far."""
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
        return self.best.update(record)

    @property
    def _checkpoints(self) -> Path:
        return self.output / CHECKPOINTS

    def _save(self) -> None:
        """From the main process, without waiting: where one process fails, others may not come."""
        if self.accelerator.is_main_process:
            options = self.config.checkpoint
            keep = self.best.step if options.keep_best else None
            self.state.save(
                self._checkpoints, self.completed, keep_last=options.keep_last, keep=keep
            )

    def _finish(self) -> Path:
        final = self.output / "final"
        self._save()
        if self.accelerator.is_main_process:
            publish(final, self._write_model)
            plot_run(self.output, self.output / "curves.png")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return final

    def _write_state(self, folder: Path) -> None:
        """What a checkpoint has besides the optimizer."""
        self._write_model(folder)
        self.reference.save(folder, self.completed)

    def _write_model(self, folder: Path) -> None:
        save_model(self.denoiser.model, self.data.tokenizer, self.config.generation, folder)

    def _base(self) -> PreTrainedModel:
        """The model RL starts from, which is also the reference policy."""
        config, device = self.config.model, self.accelerator.device
        if config.path is not None:
            return base_model(config, config.path, device)
        if needs_base(self.config):
            main = self.accelerator.is_main_process
            folder = kept_base(self.output, self.resumed, self._write_base, main=main)
            return base_model(config, str(folder), device)
        if self.config.sft is None:
            return fresh_model(config, self.data.tokenizer, self.config.seed, device)
        folder = warm_start(self.config, self.data, device)
        return base_model(config, str(folder), device)

    def _write_base(self, folder: Path) -> None:
        config, tokenizer, device = self.config, self.data.tokenizer, self.accelerator.device
        if config.sft is not None:
            shutil.copytree(warm_start(config, self.data, device), folder / WEIGHTS)
        else:
            model = fresh_model(config.model, tokenizer, config.seed, device)
            save_model(model, tokenizer, config.generation, folder)

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
        if processes != _world_size():
            raise ValueError(
                f"the launcher started {_world_size()} processes (WORLD_SIZE), accelerate sees "
                f"{processes}: they would all train the same, into one output_dir"
            )
        if self.config.prompts_per_step % processes:
            raise ValueError(
                f"prompts_per_step ({self.config.prompts_per_step}) must be a multiple of the "
                f"{processes} processes"
            )


def _world_size() -> int:
    """Processes that the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
