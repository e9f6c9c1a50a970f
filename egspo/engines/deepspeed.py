"""DeepSpeed ZeRO: a process keeps a part of the optimizer state and gradient (stage 2), and of the
weights (stage 3)."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from egspo.engines.optimization import NonFiniteError
from egspo.engines.processes import Processes

BUCKET_ELEMENTS = 50_000_000
"""Of the buffers that weights and gradients are sent in, unless the launcher says otherwise."""
# Among the modules that are using a weight, keeps it from being released.
_LOSS = "loss"
_MOMENTS = "exp_avg", "exp_avg_sq"


class DeepSpeedModel:
    """Sharded by ``deepspeed.initialize``; gradients are reduced after every micro-batch.

    DeepSpeed clips inside its step, so :meth:`clip` takes the norm and says to what to clip. A
    frozen reference stays whole in every process.

    Args:
        model: whole, the same in every process; on stage 3 sharded in place.
        make_optimizer: makes a ``torch.optim.AdamW`` of the model.
        stage: 2 or 3.
        max_grad_norm: to clip to.
        options: DeepSpeed's configuration, of the launcher; ``"auto"`` values are filled in.

    Raises:
        ValueError: deepspeed is not installed, an option contradicts the recipe, or a weight that
            is trained is not float32.
    """

    sharded = True

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        processes: Processes,
        *,
        stage: int,
        max_grad_norm: float,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                raise ValueError(
                    f"DeepSpeed trains float32 weights here, {name} is {parameter.dtype}: set "
                    "model.dtype: float32 (mixed_precision says in what products are computed)"
                )
        config = deepspeed_config(stage, max_grad_norm, processes.count, options)
        self.name, self._stage = f"zero{stage}", stage
        self.model, self.processes = model, processes
        self._deepspeed = deepspeed()
        self.optimizer = make_optimizer(model)
        # DeepSpeed puts flat parts into the groups.
        self._groups = [list(group["params"]) for group in self.optimizer.param_groups]
        self._engine = self._deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=config
        )[0]
        self._zero = self._engine.optimizer
        self._make_state()
        self._head: list[nn.Parameter] = []
        if stage == 3:
            # The loss multiplies with the head outside the model: it must come with the model's
            # forward pass, and stay until the backward pass is over.
            self._head = list(model.get_output_embeddings().parameters())  # type: ignore[operator]
            for parameter in self._head:
                self._deepspeed.zero.register_external_parameter(model, parameter)
            self._hold_head()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self._stage == 2:
            yield
            return
        self._release()
        # The hooks would release a module's weights after its forward pass.
        with self._gather(self.model.parameters()), _without_hooks(self.model):
            yield
        self._hold_head()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # As the engine's own forward does: what comes is added to what there is.
        self._zero.clear_backward_seen_flag()
        self._engine.backward(loss)

    def reduce_gradients(self, has_gradient: bool) -> bool:
        return self.processes.any(has_gradient)

    def clip(self, max_grad_norm: float) -> float:
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient norm is {norm}; the weights did not take it")
        self._zero.clip_grad = max_grad_norm
        return norm

    def step(self) -> None:
        self._engine.step()
        if not self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed made no step: no backward pass was said to be the last")
        self._hold_head()

    def weights(self) -> dict[str, Tensor] | None:
        self._release()
        whole = {}
        for name, parameter in self.model.named_parameters():
            with self._gather([parameter]):  # one at a time: a process holds one more at most
                if self.processes.is_main:
                    whole[name] = parameter.detach().to("cpu", copy=True)
        self._hold_head()
        return whole

    def optimizer_state(self) -> dict[str, Any]:
        parts = self._parts
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            options = {name: value for name, value in group.items() if name != "params"}
            groups.append({**options, "params": [len(state) + i for i in range(len(parameters))]})
            for parameter in parameters:
                step = self.optimizer.state[parts[0]]["step"].clone()
                whole = {name: self._moment(parameter, name) for name in _MOMENTS}
                state[len(state)] = {"step": step, **whole}
        return {"state": state if self.processes.is_main else {}, "param_groups": groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        for group, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        parameters = [parameter for group in self._groups for parameter in group]
        for index, values in state["state"].items():
            for part in self._parts:
                self.optimizer.state[part]["step"] = values["step"].clone()
            for name in _MOMENTS:
                self._set_moment(parameters[index], name, values[name])

    def _gradient_norm(self) -> float:
        if self._stage == 2:
            norm = float(self._zero.scaled_global_norm())
            return norm if norm >= 0 else math.nan  # it says -1 for infinity and NaN
        part = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for group in self._groups:
            for parameter in group:
                gradient = self._deepspeed.utils.safe_get_local_grad(parameter)
                part += gradient.to(part.device).double().square().sum()
        dist.all_reduce(part)
        return math.sqrt(float(part))

    def _moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Whole, of the shape of the whole weight; in the main process."""
        whole: Tensor = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, name)
        return whole.cpu() if self.processes.is_main else whole.new_empty(0)

    def _set_moment(self, parameter: Any, name: str, value: Tensor) -> None:
        utils = self._deepspeed.utils
        if self._stage == 2:
            utils.safe_set_full_optimizer_state(parameter, value, name)
            return
        # Parts are of equal size, the last one is padded.
        size = parameter.ds_tensor.numel()
        part = torch.zeros(size)
        mine = value.flatten()[self.processes.rank * size :][:size]
        part[: mine.numel()] = mine
        utils.safe_set_local_optimizer_state(parameter, part, name)

    @property
    def _parts(self) -> list[Tensor]:
        """What the optimizer updates here, a flat part of every group or more."""
        flat = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"
        parts: list[Tensor] = getattr(self._zero, flat[self._stage - 2])
        return parts

    def _make_state(self) -> None:
        """What AdamW makes in its first step.

        DeepSpeed's stage 2 looks for it between the groups of its first step, and would not find
        that of the second.
        """
        for part in self._parts:
            moments = {name: torch.zeros_like(part) for name in _MOMENTS}
            self.optimizer.state[part] = {"step": torch.zeros(()), **moments}
        if self._stage == 2:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _hold_head(self) -> None:
        """Keep the head, once gathered, until a step or :meth:`gathered` releases everything."""
        for parameter in self._head:
            parameter.ds_active_sub_modules.add(_LOSS)  # type: ignore[attr-defined]

    def _release(self) -> None:
        """Every weight, so that it may be gathered otherwise."""
        if self._stage == 3:
            self._engine.empty_partition_cache()

    def _gather(self, parameters: Any) -> Any:
        return self._deepspeed.zero.GatheredParameters(parameters, enabled=self._stage == 3)


def deepspeed() -> ModuleType:
    """The library; raises ValueError where it is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "distributed.engine: zero2 and zero3 need deepspeed, which is not installed: pip "
            "install 'egspo[deepspeed]'"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    library: ModuleType = importlib.import_module("deepspeed")
    return library


def deepspeed_config(
    stage: int, max_grad_norm: float, processes: int, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration, with what the recipe decides.

    Args:
        stage, max_grad_norm: of the recipe.
        processes: their number.
        options: the launcher's configuration; ``"auto"`` values are filled in.

    Raises:
        ValueError: ``options`` contradict the recipe, or ask for what is not possible here.
    """
    config = _without_auto(copy.deepcopy(dict(options or {})))
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(f"DeepSpeed's {section} is not used: the recipe says what there is")
    for section in ("fp16", "bf16"):
        if config.get(section, {}).get("enabled", False):
            raise ValueError(
                f"DeepSpeed's {section} casts the weights: leave it out, mixed_precision of the "
                "recipe says in what products are computed"
            )
    zero = config.setdefault("zero_optimization", {})
    if zero.setdefault("stage", stage) != stage:
        raise ValueError(f"DeepSpeed's zero_optimization.stage is {zero['stage']}, not {stage}")
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device", "none") != "none":
            raise ValueError(
                f"DeepSpeed's zero_optimization.{name} is not supported: leave it out, or use "
                "distributed.engine: fsdp2 with distributed.offload"
            )
    # DeepSpeed's own, ten times as large, are sized for larger models and take 2 GB each.
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        zero.setdefault(name, BUCKET_ELEMENTS)
    ours = {
        "gradient_clipping": max_grad_norm,
        "gradient_accumulation_steps": 1,  # said by every backward pass
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": processes,
    }
    for name, value in ours.items():
        if config.setdefault(name, value) != value:
            raise ValueError(
                f"DeepSpeed's {name} is {config[name]}, by the recipe it is {value}: leave it out "
                'or say "auto"'
            )
    return {"steps_per_print": math.inf, **config, "zero_allow_untested_optimizer": True}


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if value != "auto"}
    return {n: _without_auto(v) if isinstance(v, dict) else v for n, v in kept.items()}


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, modules of ``model`` run without the hooks they have."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(module, name, getattr(module, name)) for module in model.modules() for name in names]
    for module, name, _ in kept:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)
