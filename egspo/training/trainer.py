"""A training run: the loop around an iteration, with what must survive it."""

from __future__ import annotations

import logging
import signal
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from egspo.algorithm.batch import Metrics
from egspo.algorithm.iteration import Iteration
from egspo.algorithm.pipeline import Pipeline
from egspo.config import TrainConfig
from egspo.config.recipe import config_to_dict, save_config
from egspo.engines.optimization import NonFiniteError, advance
from egspo.engines.reduction import merge
from egspo.inspection.plotting import plot_run
from egspo.inspection.sample_table import SampleTable
from egspo.runs.checkpoint import CHECKPOINTS, list_checkpoints, remove_later, step_of
from egspo.runs.lock import RunLockedError
from egspo.runs.metrics import MetricsWriter
from egspo.runs.published import publish
from egspo.runs.samples import carry_samples, set_damaged_aside, write_group
from egspo.training.best import BestSoFar
from egspo.training.continuation import Resume, flat
from egspo.training.data_identity import save_data_identity
from egspo.training.data_order import data_order
from egspo.training.empty_steps import EmptySteps
from egspo.training.evaluation import average, evaluate
from egspo.training.occupation import occupy
from egspo.training.progress import RunProgress
from egspo.training.setup import assemble, launched, made_before, origin
from egspo.training.state import Termination, copy_weights, saved_best
from egspo.training.trackers import tracker_options

logger = logging.getLogger("egspo")

# Keeps the noise of sampled evaluation apart from training's.
_EVAL_STREAM = 0x6576616C


def train(config: TrainConfig, *, resume: Resume = None) -> Path:
    """Train by ``config``; returns the folder of the trained model.

    ``config.output_dir`` gets ``config.yaml``, ``metrics.jsonl``, ``samples/``, ``samples.html``,
    ``checkpoints/``, ``final/`` and ``curves.png``, and ``base/`` where a new model gets an adapter
    or has a reference policy. An error, interrupt or SIGTERM ends the run with a checkpoint of the
    last whole step, unless it comes in the middle of an update; what kills at once leaves the last
    one made.

    Args:
        config: the run.
        resume: a checkpoint, or a run whose newest checkpoint to continue from; ``"auto"`` for the
            newest intact one in ``output_dir``, or from the beginning without any.

    Raises:
        CheckpointError: ``resume`` is damaged, or not of a run with this configuration; or
            ``output_dir`` has another run's checkpoints.
        EmptyRunError: for ``max_empty_steps`` steps there was nothing to update on.
        LostProcessError: another process died or froze.
        NonFiniteError: on a NaN or infinite loss or gradient, before the weights take it.
        NotOursError: ``output_dir`` has something else where the run would write.
        OSError: ``output_dir`` or the warm-start cache cannot be written, or a disk is too full.
        RewardError: a reward function failed, and ``task.on_reward_error`` is ``raise``.
        RunLockedError: another run goes on in ``output_dir``, or the folder is gone.
        ValueError: data, model and configuration do not fit together.
    """
    return Trainer(config, resume=resume).run()


class Trainer:
    """A run whose parts are built, ready to go; see :func:`train`."""

    def __init__(self, config: TrainConfig, *, resume: Resume = None) -> None:
        self.output = Path(config.output_dir)
        launch = launched(config)
        self.config = launch.config
        self.accelerator, self.processes = launch.accelerator, launch.processes
        with self.processes.collective():
            self._lock = occupy(self.output, self.processes)
            try:
                self.origin = origin(self.config, resume)
                parts = assemble(launch, self.origin)
            except BaseException:
                self._release()
                raise
        self.data, self.denoiser, self.reference = parts.data, parts.denoiser, parts.reference
        self.engine, self.state, self._identity = parts.engine, parts.state, parts.identity
        self.iteration = Iteration(
            self.config, self.data, self.denoiser, self.engine, self.processes, parts.values
        )
        self.pipeline = Pipeline(self.config, self.iteration, self._work)
        self.completed = self.origin.step
        self.best = self._best_so_far()
        config = self.config
        self.empty = EmptySteps(
            config.max_empty_steps,
            config.prompts_per_step * config.algorithm.group_size,
            made_before(self.origin),
        )
        self._between_steps = True
        self._table: SampleTable | None = None  # of the main process, once the trackers are there

    def run(self) -> Path:
        """Train to ``config.steps``; on an error or interrupt the intact state is saved first."""
        with self.processes.collective():
            try:
                return self._run()
            finally:
                self._release()

    def _run(self) -> Path:
        main, start = self.processes.is_main, self.completed
        writer = self._open()
        try:
            with (
                RunProgress(
                    self.config.steps, "EGSPO", start=start, enabled=main, gpus=self._gpus
                ) as progress,
                Termination(deferred=self.engine.sharded) as termination,
                closing(self.pipeline),
            ):
                if self.origin.run is None:
                    self._log({"step": 0, **self._evaluate()}, writer, progress)
                for step in range(start + 1, self.config.steps + 1):
                    if self._is_hopeless():
                        break
                    record = self._step(step)
                    improved = self._log(record, writer, progress)
                    self._complete(step, improved)
                    self.empty.check(step, record)
                    if self.engine.sharded and self.processes.any(termination.requested):
                        self._save()
                        raise SystemExit(128 + signal.SIGTERM)
        except BaseException:
            self._rescue()
            raise
        return self._finish()

    @property
    def _gpus(self) -> int:
        return self.processes.count if self.denoiser.device.type == "cuda" else 0

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _check_lock(self) -> None:
        """Before anything is written: the folder is there, and still this run's."""
        if self._lock is not None:
            self._lock.check()

    def _best_so_far(self) -> BestSoFar:
        checkpoint, run = self.origin.checkpoint, self.origin.run
        if checkpoint is None or run is None:
            return BestSoFar()
        saved = saved_best(checkpoint)
        if saved is not None:
            return saved
        return BestSoFar.of(made_before(self.origin))

    def _open(self) -> MetricsWriter:
        """Make the folder of the run ready, and what reports of it."""
        main, resumed = self.processes.is_main, self.origin.run
        if main:
            remove_later(self._checkpoints, self.completed)
            save_config(self.config, self.output / "config.yaml")
            save_data_identity(self.output, self._identity)
        options = flat(config_to_dict(self.config))
        self.accelerator.init_trackers(
            "egspo",
            config={k: v if isinstance(v, int | float) else str(v) for k, v in options.items()},
            init_kwargs=tracker_options(self.output, resumed)
            if main and "wandb" in self.config.trackers
            else {},
        )
        if main:
            if resumed is not None:
                carry_samples(resumed, self.output, self.completed)
            set_damaged_aside(self.output, self.completed)
            trackers = self.accelerator.trackers
            self._table = SampleTable(self.output, trackers, completed=self.completed)
        writer = MetricsWriter(
            self.output / "metrics.jsonl" if main else None,
            resume_after=self.completed if resumed else None,
            history=resumed and resumed / "metrics.jsonl",
        )
        writer.warn_of_missing(range(1, self.completed + 1))
        return writer

    def _complete(self, step: int, improved: bool) -> None:
        """All of ``step`` is done; save where that is due."""
        self.completed, self._between_steps = step, True
        self.iteration.changed = False
        options = self.config.checkpoint
        if self.config.saves_at(step) or (improved and options.keep_best):
            self._save()

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
        elif self.completed and self._between_steps and not self.iteration.changed:
            try:
                self._save()
            except (OSError, NonFiniteError, RunLockedError) as error:  # must not hide the cause
                logger.error("step %d could not be saved: %s", self.completed, error)

    def _step(self, step: int) -> Metrics:
        """One iteration, the evaluation that is due, and what to log of both."""
        config = self.config
        start, worked = time.perf_counter(), time.process_time()
        metrics = self.pipeline.step(step)
        updated = self.iteration.updated  # of all processes, or of none
        metrics["lr"] = self.state.scheduler.get_last_lr()[0]
        self._between_steps = False
        advance(self.state.scheduler)
        self.reference.after(step)
        self.processes.enter(f"the end of step {step}")
        metrics["time/processor"] = time.process_time() - worked
        metrics = merge(self.processes.gather(metrics))
        self.empty.after(step, metrics, updated=updated)
        if config.evaluates_at(step):
            if self._table is not None and self.iteration.group:
                self._check_lock()
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
        rank, processes = self.processes.rank, self.processes.count
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
        self._check_lock()
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

    def _save(self) -> Path | None:
        """The checkpoint of the last step, in the main process.

        Of whole models without waiting: where one process fails, others may not come.
        """
        main, options = self.processes.is_main, self.config.checkpoint
        if not main and not self.engine.sharded:
            return None
        self._check_lock()
        self.processes.enter(f"saving step {self.completed}")
        self.reference.collect(self.completed, main=main)
        return self.state.save(
            self._checkpoints,
            self.completed,
            keep_last=options.keep_last,
            keep=self.best.step if options.keep_best else None,
            main=main,
            best=asdict(self.best),
        )

    def _finish(self) -> Path:
        final = self.output / "final"
        saved = self._save()
        if saved is not None:
            publish(final, lambda folder: copy_weights(saved, folder))
            plot_run(self.output, self.output / "curves.png")
        self.processes.enter("the end")
        self.processes.gather(None)
        self.accelerator.end_training()
        return final
