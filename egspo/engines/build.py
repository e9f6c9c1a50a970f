"""Which engine a run has, and its making."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Literal, cast

from accelerate import Accelerator
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from egspo.config import TrainConfig
from egspo.engines.deepspeed import DeepSpeedModel
from egspo.engines.fsdp import ShardedModel
from egspo.engines.optimization import build_optimizer
from egspo.engines.processes import Processes
from egspo.engines.whole import Engine, WholeModel
from egspo.rollouts.denoiser import Denoiser

logger = logging.getLogger("egspo")

Chosen = Literal["replicated", "fsdp2", "zero2", "zero3"]


def choose_engine(config: TrainConfig, accelerator: Accelerator) -> Chosen:
    """``distributed.engine``, where it is ``auto`` what accelerate was configured for.

    Raises:
        ValueError: the engine is not possible with these processes or options; says why.
    """
    asked, configured = config.distributed.engine, _configured(accelerator)
    if asked != "auto" and configured not in (None, asked):
        raise ValueError(
            f"distributed.engine is {asked}, accelerate is configured for {configured}: let one of "
            "them decide"
        )
    chosen = cast(Chosen, configured or "replicated") if asked == "auto" else asked
    if chosen != "replicated":
        if accelerator.num_processes == 1:
            raise ValueError(
                f"distributed.engine: {chosen} shards over processes and there is one: start it "
                "by accelerate launch or torchrun"
            )
        config.check_shardable(chosen)
    if configured == "zero3":
        # A model is loaded whole and sharded afterwards: transformers is not to do it.
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call, unused-ignore]
    if accelerator.num_processes > 1:
        logger.info("engine %s on %d processes", chosen, accelerator.num_processes)
    return chosen


def build_engine(
    name: Chosen,
    config: TrainConfig,
    denoiser: Denoiser,
    processes: Processes,
    accelerator: Accelerator,
) -> Engine:
    """The engine ``name`` over the model of ``denoiser``, whose weights are as they are to be.

    Raises:
        ValueError: as the engine's class.
    """
    if name == "fsdp2":
        return ShardedModel(
            denoiser.model,
            lambda model: build_optimizer(model, config.optimizer),
            processes,
            device_type=accelerator.device.type,
            reference=denoiser.reference_model,
            reshard=config.distributed.reshard,
            offload=config.distributed.offload,
            reference_head=config.algorithm.kl == "exact",
        )
    if name in ("zero2", "zero3"):
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        return DeepSpeedModel(
            denoiser.model,
            lambda model: build_optimizer(model, config.optimizer),
            processes,
            stage=int(name[-1]),
            max_grad_norm=config.optimizer.max_grad_norm,
            options=getattr(plugin, "deepspeed_config", None),
        )
    return WholeModel(
        denoiser.model, lambda model: build_optimizer(model, config.optimizer), processes
    )


def with_accelerate_options(config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """``config`` with what accelerate's own configuration says of the engine."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if config.distributed.engine != "auto" or plugin is None:
        return config
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    distributed = replace(
        config.distributed,
        engine="fsdp2",
        reshard=bool(plugin.reshard_after_forward),
        offload=offload,
    )
    return replace(config, distributed=distributed)


def _configured(accelerator: Accelerator) -> str | None:
    """The engine that accelerate was configured for; None where it leaves that open."""
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("NO", "MULTI_CPU", "MULTI_GPU"):
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise ValueError(
                "accelerate leaves the DeepSpeed it is configured for out on a CPU: set "
                "distributed.engine to zero2 or zero3 and start it by torchrun"
            )
        return None
    if kind == "FSDP":
        if accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("accelerate is configured for FSDP 1: set fsdp_version: 2")
        return "fsdp2"
    if kind == "DEEPSPEED":
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage in (2, 3):
            return f"zero{stage}"
        raise ValueError(f"accelerate is configured for DeepSpeed stage {stage}: choose 2 or 3")
    raise ValueError(
        f"accelerate is configured for {kind}: choose data parallelism, FSDP 2 or DeepSpeed"
    )
