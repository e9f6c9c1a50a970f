"""A training run: the loop around an iteration, with what must survive it."""

from __future__ import annotations

import logging
import shutil
import signal
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from egspo.algorithm.batch import Metrics
from egspo.algorithm.iteration import Iteration
from egspo.algorithm.pipeline import Pipeline
from egspo.algorithm.reference import ReferenceRefresh
from egspo.config import TrainConfig
from egspo.config.recipe import config_to_dict, save_config
from egspo.engines import build_engine, choose_engine, with_accelerate_options
from egspo.engines.optimization import NonFiniteError, advance, build_scheduler
from egspo.engines.processes import Processes, process_state
from egspo.engines.reduction import merge
from egspo.inspection.plotting import plot_run
from egspo.inspection.sample_table import SampleTable
from egspo.models.quantization import check_quantization
from egspo.rollouts.graphs import check_device
from egspo.runs.checkpoint import (
    CHECKPOINTS,
    PARTIAL,
    check_unclaimed,
    check_writable,
    find_checkpoint,
    list_checkpoints,
    publish,
    remove_later,
    remove_partial,
    step_of,
)
from egspo.runs.metrics import MetricsWriter, read_metrics
from egspo.runs.samples import carry_samples, write_group
from egspo.tasks.prompts import build_data
from egspo.training.best import BestSoFar
from egspo.training.build import base_model, build_denoiser, check_data, check_trackers, fresh_model
from egspo.training.continuation import check_continuation, flat
from egspo.training.data_order import data_order
from egspo.training.evaluation import average, evaluate
from egspo.training.progress import RunProgress
from egspo.training.state import (
    WEIGHTS,
    Termination,
    TrainingState,
    load_weights,
    resumed_step,
    trained_bytes,
)
from egspo.training.warm_start import kept_base, needs_base, save_model, warm_start

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
        self.output = Path(config.output_dir)
        check_trackers(config)
        process_state(timedelta(seconds=config.distributed.timeout))
        # Precision is the denoiser's business, in rollout, scoring and update alike.
        self.accelerator = Accelerator(
            mixed_precision="no",
            log_with=list(config.trackers) or None,
            project_dir=config.output_dir,
        )
        engine = choose_engine(config, self.accelerator)
        self.config = config = with_accelerate_options(config, self.accelerator)
        self.processes = Processes(config.distributed.timeout)
        self._check_work()
        check_quantization(config, self.accelerator.device)
        if config.generation.cuda_graphs:
            check_device(self.accelerator.device)
        check_writable(self.output, 0)
        self._check_shared()
        checkpoint = None if resume is None else find_checkpoint(resume)
        check_unclaimed(self._checkpoints, checkpoint)
        self.completed = 0
        if checkpoint is not None:
            check_continuation(config, checkpoint.parent.parent, "train")
            self.completed = resumed_step(checkpoint, "train", "steps", config.steps)

        self.resumed = None if checkpoint is None else checkpoint.parent.parent
        self.data = build_data(config)
        # What is to be sharded comes to the device part by part.
        self._placed = torch.device("cpu") if engine == "fsdp2" else self.accelerator.device
        with self.processes.main_first():
            base = self._base()
        check_data(config, self.data, getattr(base.config, "max_sequence_length", None))
        device = self.accelerator.device
        self.denoiser = build_denoiser(config, base, self.data.tokenizer, device)
        self.reference = ReferenceRefresh(config.algorithm, self.denoiser)
        model = self.denoiser.model
        # Enough for the checkpoints, one being written, and the final model.
        copies = config.checkpoint.keep_last + config.checkpoint.keep_best + 2
        needed = trained_bytes(model, copies) + copies * self.reference.bytes
        check_writable(self.output, needed)
        if checkpoint is not None:
            load_weights(model, checkpoint)
            self.reference.load(checkpoint, self.completed)
        self.engine = build_engine(engine, config, self.denoiser, self.processes, self.accelerator)
        scheduler = build_scheduler(self.engine.optimizer, config.optimizer, config.steps)
        self.state = TrainingState("train", model, self.engine, scheduler, self._write_state)
        if checkpoint is not None:
            self.state.load(checkpoint)
        self.iteration = Iteration(config, self.data, self.denoiser, self.engine, self.processes)
        self.pipeline = Pipeline(config, self.iteration, self._work)
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
                Termination(deferred=self.engine.sharded) as termination,
                closing(self.pipeline),
            ):
                if not self.resumed:
                    self._log({"step": 0, **self._evaluate()}, writer, progress)
                for step in range(self.completed + 1, config.steps + 1):
                    if self._is_hopeless():
                        break
                    improved = self._log(self._step(step), writer, progress)
                    self.completed, self._between_steps = step, True
                    self.iteration.updated = False
                    if config.saves_at(step) or (improved and config.checkpoint.keep_best):
                        self._save()
                    if self.engine.sharded and self.processes.any(termination.requested):
                        self._save()
                        raise SystemExit(128 + signal.SIGTERM)
        except BaseException:
            self._rescue()
            raise
        return self._finish()

    def _rescue(self) -> None:
        """Save the last whole step before an error or interrupt ends the run.

        Halfway through an update the weights belong to no step. The parts of a sharded model are
        with the other processes, which may be gone: there the last checkpoint counts.
        """
        if self.engine.sharded:
            newest = list_checkpoints(self._checkpoints)[-1:]
            saved = step_of(newest[0]) if newest else 0
            if self.processes.is_main and saved < self.completed:
                logger.error("the steps from %d to %d are lost", saved + 1, self.completed)
        elif self.completed and self._between_steps and not self.iteration.updated:
            try:
                self._save()
            except (OSError, NonFiniteError) as error:  # must not hide what ended the run
                logger.error("step %d could not be saved: %s", self.completed, error)

    def _step(self, step: int) -> Metrics:
        """One iteration, the evaluation that is due, and what to log of both."""
        config = self.config
        start = time.perf_counter()
        metrics = self.pipeline.step(step)
        metrics["lr"] = self.state.scheduler.get_last_lr()[0]
        self._between_steps = False
        advance(self.state.scheduler)
        self.reference.after(step)
        self.processes.enter(f"the end of step {step}")
        metrics = merge(self.processes.gather(metrics))
        if config.evaluates_at(step):
            if self._table is not None and self.iteration.group:
                write_group(self.output, step, self.iteration.group)
                self._table.add(step, self.iteration.group)
            self.processes.enter(f"the evaluation of step {step}")
            metrics.update(self._evaluate())
        metrics["time/step"] = time.perf_counter() - start
        return {"step": step, **metrics}

    def _work(self, step: int) -> tuple[list[int], int]:
        """Prompts of all processes, and the id of the first sequence."""
        config, count = self.config, self.config.prompts_per_step
        first = (step - 1) * count
        prompts = data_order(config.seed, len(self.data.train), first, count)
        return prompts, first * config.algorithm.group_size

    def _evaluate(self) -> Metrics:
        """Held-out metrics, each process decoding its share of the prompts."""
        start = time.perf_counter()
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        with self.engine.gathered():
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
        means = average([r for part in self.processes.gather(records) for r in part])
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
        """Of whole models without waiting: where one process fails, others may not come."""
        main, options = self.accelerator.is_main_process, self.config.checkpoint
        if main or self.engine.sharded:
            self.processes.enter(f"saving step {self.completed}")
            self.reference.collect(self.completed, main=main)
            self.state.save(
                self._checkpoints,
                self.completed,
                keep_last=options.keep_last,
                keep=self.best.step if options.keep_best else None,
                main=main,
            )

    def _finish(self) -> Path:
        final = self.output / "final"
        self._save()
        weights = self.engine.weights()
        if self.accelerator.is_main_process:
            publish(final, lambda folder: self._write_model(folder, weights))
            plot_run(self.output, self.output / "curves.png")
        self.processes.enter("the end")
        self.processes.gather(None)
        self.accelerator.end_training()
        return final

    def _write_state(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        """What a checkpoint has besides the optimizer."""
        self._write_model(folder, weights)
        self.reference.save(folder)

    def _write_model(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        config, tokenizer = self.config, self.data.tokenizer
        save_model(self.denoiser.model, tokenizer, config.generation, folder, weights)

    def _base(self) -> PreTrainedModel:
        """The model RL starts from, which is also the reference policy."""
        config, device, placed = self.config.model, self.accelerator.device, self._placed
        if config.path is not None:
            return base_model(config, config.path, device, placed)
        if needs_base(self.config):
            main = self.accelerator.is_main_process
            folder = kept_base(self.output, self.resumed, self._write_base, main=main)
            return base_model(config, str(folder), device, placed)
        if self.config.sft is None:
            return fresh_model(config, self.data.tokenizer, self.config.seed, device, placed)
        main = self.processes.is_main
        folder = warm_start(self.config, self.data, device, only_cached=not main)
        return base_model(config, str(folder), device, placed)

    def _write_base(self, folder: Path) -> None:
        config, tokenizer, device = self.config, self.data.tokenizer, self.accelerator.device
        if config.sft is not None:
            shutil.copytree(warm_start(config, self.data, device), folder / WEIGHTS)
        else:
            model = fresh_model(config.model, tokenizer, config.seed, device)
            save_model(model, tokenizer, config.generation, folder)

    def _check_shared(self) -> None:
        """What one process writes, those on other machines must find."""
        probe = self.output / f"{PARTIAL}shared"
        if self.processes.is_main:
            probe.touch()
        self.processes.gather(None)
        seen = self.processes.gather(probe.exists())
        if self.processes.is_main:
            probe.unlink()
        blind = [rank for rank, found in enumerate(seen) if not found]
        if blind:
            raise OSError(
                f"output_dir {self.output} is not the same folder in all processes: {blind} do not "
                "see what process 0 wrote; put it on a shared file system"
            )

    def _check_work(self) -> None:
        """Every process denoises at least one sequence per step."""
        config, processes = self.config, self.processes.count
        sequences = config.prompts_per_step * config.algorithm.group_size
        if sequences < processes:
            raise ValueError(
                f"prompts_per_step ({config.prompts_per_step}) times algorithm.group_size "
                f"({config.algorithm.group_size}) gives {sequences} sequences to {processes} "
                "processes: it must be at least one each"
            )
