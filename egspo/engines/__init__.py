"""Training on several processes, by the engines that accelerate knows."""

from egspo.engines.build import build_engine, choose_engine, with_accelerate_options
from egspo.engines.whole import Engine, WholeModel

__all__ = ["Engine", "WholeModel", "build_engine", "choose_engine", "with_accelerate_options"]
