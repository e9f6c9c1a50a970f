"""The configuration of a run: its options, and the recipes that set them."""

from egspo.config.options.algorithm import (
    AlgorithmConfig,
    EntropyOver,
    EntropyReduce,
    Preset,
    SharePrompts,
    Strategy,
)
from egspo.config.options.checkpoint import CheckpointConfig
from egspo.config.options.distributed import DistributedConfig, EngineName
from egspo.config.options.evaluation import EvalConfig
from egspo.config.options.generation import BlockCache, GenerationConfig, Policy
from egspo.config.options.model import LoraConfig, ModelConfig
from egspo.config.options.objectives import OBJECTIVES, REMASKED
from egspo.config.options.optimizer import OptimizerConfig
from egspo.config.options.run import Protocol, TrainConfig
from egspo.config.options.sft import SFTConfig
from egspo.config.options.task import TaskConfig
from egspo.config.presets import PRESETS

__all__ = [
    "OBJECTIVES",
    "PRESETS",
    "REMASKED",
    "AlgorithmConfig",
    "BlockCache",
    "CheckpointConfig",
    "DistributedConfig",
    "EngineName",
    "EntropyOver",
    "EntropyReduce",
    "EvalConfig",
    "GenerationConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Policy",
    "Preset",
    "Protocol",
    "SFTConfig",
    "SharePrompts",
    "Strategy",
    "TaskConfig",
    "TrainConfig",
]
