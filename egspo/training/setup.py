"""From a configuration to the parts of a run that is about to begin or to go on."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from egspo.algorithm.batch import Metrics
from egspo.algorithm.reference import ReferenceRefresh
from egspo.algorithm.value_head import ValueHead
from egspo.config import TrainConfig
from egspo.config.protocol import deviations
from egspo.engines import Engine, build_engine, choose_engine, with_accelerate_options
from egspo.engines.build import Chosen
from egspo.engines.optimization import build_scheduler
from egspo.engines.processes import Processes, process_state
from egspo.models.quantization import check_quantization
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.graphs import check_device
from egspo.runs.checkpoint import check_writable
from egspo.runs.metrics import read_metrics
from egspo.tasks.prompts import Data, build_data
from egspo.training.build import base_model, build_denoiser, check_data, check_trackers, fresh_model
from egspo.training.continuation import Resume, chosen_checkpoint
from egspo.training.data_identity import Identity, check_same_data, data_identity
from egspo.training.state import WEIGHTS, TrainingState, load_weights, resumed_step, trained_bytes
from egspo.training.warm_start import kept_base, needs_base, save_model, warm_start

logger = logging.getLogger("egspo")


@dataclass(frozen=True)
class Launch:
    """The processes of a run, and what one of them runs on."""

    config: TrainConfig
    """Of the run, with what accelerate's own configuration says of the engine."""
    accelerator: Accelerator
    processes: Processes
    engine: Chosen

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def placed(self) -> torch.device:
        """Where weights are put first: what is to be sharded comes to the device part by part."""
        return torch.device("cpu") if self.engine == "fsdp2" else self.device


@dataclass(frozen=True)
class Origin:
    """What a run goes on from; nothing, where it begins."""

    checkpoint: Path | None = None
    step: int = 0

    @property
    def run(self) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint.parent.parent


@dataclass(frozen=True)
class Parts:
    """All that a run trains with, as it is before the next step."""

    launch: Launch
    origin: Origin
    data: Data
    identity: Identity
    denoiser: Denoiser
    reference: ReferenceRefresh
    values: ValueHead | None
    engine: Engine
    state: TrainingState


def launched(config: TrainConfig) -> Launch:
    """Join the processes that the launcher started.

    Raises:
        ValueError: an option is not possible on these processes or this device.
    """
    check_trackers(config)
    process_state(timedelta(seconds=config.distributed.timeout))
    # Precision is the denoiser's business, in rollout, scoring and update alike.
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=list(config.trackers) or None,
        project_dir=config.output_dir,
    )
    engine = choose_engine(config, accelerator)
    config = with_accelerate_options(config, accelerator)
    processes = Processes(config.distributed.timeout)
    if config.protocol == "published" and processes.is_main:
        logger.info("protocol: published, but for: %s", "; ".join(deviations(config)) or "nothing")
    _check_work(config, processes)
    check_quantization(config, accelerator.device)
    if config.generation.cuda_graphs:
        check_device(accelerator.device)
    if config.model.attn_implementation == "flex_attention" and accelerator.device.type == "cpu":
        raise ValueError(
            "model.attn_implementation: flex_attention has no backward pass on a CPU: use sdpa"
        )
    return Launch(config, accelerator, processes, engine)


def origin(config: TrainConfig, resume: Resume) -> Origin:
    """What a run with ``config`` goes on from.

    Raises:
        CheckpointError: it may not go on from there, or the output has checkpoints of another run.
    """
    checkpoint = chosen_checkpoint(config, resume, "train")
    if checkpoint is None:
        return Origin()
    return Origin(checkpoint, resumed_step(checkpoint, "train", "steps", config.steps))


def made_before(origin: Origin) -> list[Metrics]:
    """Metrics of the steps that were made before; empty where they are lost or there are none."""
    if origin.run is None or not (origin.run / "metrics.jsonl").exists():
        return []
    return [record for record in read_metrics(origin.run) if record["step"] <= origin.step]


def assemble(launch: Launch, origin: Origin) -> Parts:
    """Data, model, engine and optimizer, with the state of ``origin``.

    Raises:
        CheckpointError: its files do not fit the model.
        OSError: there is no room for what the run saves.
        ValueError: data, model and configuration do not fit together.
    """
    config, output = launch.config, Path(launch.config.output_dir)
    data = build_data(config)
    identity = data_identity(data.task)
    if origin.run is not None:
        check_same_data(config, identity, origin.run)
    with launch.processes.main_first():
        base = _base(launch, origin, data)
    check_data(config, data, base.config)
    denoiser = build_denoiser(config, base, data.tokenizer, launch.device)
    reference = ReferenceRefresh(config.algorithm, denoiser)
    # Enough for the checkpoints, one being written, and the final model.
    copies = config.checkpoint.keep_last + config.checkpoint.keep_best + 2
    needed = trained_bytes(denoiser.model, copies) + copies * reference.bytes
    check_writable(output, needed)
    if origin.checkpoint is not None:
        load_weights(denoiser.model, origin.checkpoint)
        reference.load(origin.checkpoint, origin.step)
    engine = build_engine(launch.engine, config, denoiser, launch.processes, launch.accelerator)
    values = ValueHead.of(config.algorithm, denoiser, launch.processes)
    scheduler = build_scheduler(engine.optimizer, config.optimizer, config.steps)

    def write(folder: Path, weights: dict[str, Tensor] | None) -> None:
        save_model(denoiser.model, data.tokenizer, config.generation, folder, weights)
        reference.save(folder)
        if values is not None:
            values.save(folder)

    state = TrainingState("train", denoiser.model, engine, scheduler, write)
    if origin.checkpoint is not None:
        state.load(origin.checkpoint)
        if values is not None:
            values.load(origin.checkpoint)
    return Parts(launch, origin, data, identity, denoiser, reference, values, engine, state)


def _check_work(config: TrainConfig, processes: Processes) -> None:
    """Every process denoises at least one sequence per step."""
    sequences = config.prompts_per_step * config.algorithm.group_size
    if sequences < processes.count:
        raise ValueError(
            f"prompts_per_step ({config.prompts_per_step}) times algorithm.group_size "
            f"({config.algorithm.group_size}) gives {sequences} sequences to {processes.count} "
            "processes: it must be at least one each"
        )


def _base(launch: Launch, origin: Origin, data: Data) -> PreTrainedModel:
    """The model RL starts from, which is also the reference policy."""
    config, device, placed = launch.config, launch.device, launch.placed
    main = launch.processes.is_main
    if config.model.path is not None:
        return base_model(config.model, config.model.path, device, placed)
    if needs_base(config):

        def write(folder: Path) -> None:
            if config.sft is not None:
                shutil.copytree(warm_start(config, data, device), folder / WEIGHTS)
            else:
                model = fresh_model(config.model, data.tokenizer, config.seed, device)
                save_model(model, data.tokenizer, config.generation, folder)

        folder = kept_base(Path(config.output_dir), origin.run, write, main=main)
        return base_model(config.model, str(folder), device, placed)
    if config.sft is None:
        return fresh_model(config.model, data.tokenizer, config.seed, device, placed)
    folder = warm_start(config, data, device, only_cached=not main)
    return base_model(config.model, str(folder), device, placed)
