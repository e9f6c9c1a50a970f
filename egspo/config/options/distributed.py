"""Several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from egspo.config.options.checks import require

EngineName = Literal["auto", "replicated", "fsdp2", "zero2", "zero3"]


@dataclass
class DistributedConfig:
    """Several processes, started by ``accelerate launch`` or ``torchrun``."""

    engine: EngineName = "auto"
    """``replicated``: the whole model in every process. ``fsdp2``, ``zero2`` and ``zero3`` shard
    what is trained. ``auto`` is what accelerate was configured for, ``replicated`` by default."""
    reshard: bool = True
    """``fsdp2``: free a block's whole weights between its forward and backward pass."""
    offload: bool = False
    """``fsdp2``: keep weights and optimizer state in host memory between passes."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others before the run ends with an error that says who
    is missing and in which phase. Longer than any process may be longer than others: rollout,
    rewards, saving."""

    def __post_init__(self) -> None:
        require(self.timeout > 0, f"distributed.timeout must be > 0, got {self.timeout}")
        for name, default in (("reshard", True), ("offload", False)):
            value = getattr(self, name)
            require(
                value == default or self.engine == "fsdp2",
                f"distributed.{name}: {str(value).lower()} needs distributed.engine: fsdp2, got "
                f"{self.engine}",
            )
