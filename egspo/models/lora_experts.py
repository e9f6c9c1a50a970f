"""Low-rank adapters on the routed experts of a layer, stacked in memory as the experts are.

In files every expert has its own factors, under the names that PEFT gives them where experts are
linear modules: ``...mlp.experts.3.up_proj.lora_A.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from egspo.models.experts import Experts, Product, grouped

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

SEPARATE = r".*\.mlp\.experts\.\d+\.(?:gate|up|down)_proj"
"""The experts' projections as modules of their own, among PEFT's ``target_modules``."""
_STACKED = r".*\.mlp\.experts"

_FACTOR = re.compile(r"(.*\.mlp\.experts)\.(lora_[AB](?:\.\w+)?)\.(gate|up|down)_proj")
_OF_EXPERT = re.compile(
    r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(lora_[AB](?:\.\w+)?)\.weight"
)


class LoraExperts(nn.Module, LoraLayer):
    """Experts, and for each adapter factors of every expert's three projections.

    By adapter and projection, ``lora_A`` is [E, r, in] and ``lora_B`` [E, out, r].
    """

    base_layer: Experts
    in_features: int
    out_features: int
    lora_A: Any
    lora_B: Any
    lora_dropout: Any

    def __init__(
        self,
        base_layer: Experts,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: int,
        **_: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.gate_up_proj.shape[2], module.down_proj.shape[2]

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **_: Any
    ) -> None:
        """Add an adapter, which changes nothing until it is trained, as PEFT asks."""
        if config.use_dora or config.lora_bias or config.init_lora_weights is not True:
            raise ValueError(
                "adapters on routed experts are plain: use_dora and lora_bias must be false and "
                f"init_lora_weights true, got {config.use_dora}, {config.lora_bias} and "
                f"{config.init_lora_weights}"
            )
        base = self.base_layer
        count, width, hidden = base.down_proj.shape
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden)}
        shapes["down_proj"] = (hidden, width)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (r**0.5 if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        first, second = {}, {}
        for name, (inner, outer) in shapes.items():
            like = base.down_proj.detach()
            bound = inner**-0.5  # as of a linear module's weight
            first[name] = nn.Parameter(like.new_empty(count, r, inner).uniform_(-bound, bound))
            second[name] = nn.Parameter(like.new_zeros(count, outer, r))
        self.lora_A[adapter_name] = nn.ParameterDict(first)
        self.lora_B[adapter_name] = nn.ParameterDict(second)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def per_token(self) -> int:
        """Experts that a token goes through."""
        return int(self.base_layer.config.num_experts_per_tok)

    def active_parameters(self, adapter: str) -> int:
        """Of the experts that a token goes through."""
        per_rank = len(PROJECTIONS) * (self.in_features + self.out_features)
        return self.per_token * int(self.r[adapter]) * per_rank

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """As :class:`Experts`."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        plain = self.disable_adapters or self.merged or not self._active()
        result: Tensor = self.base_layer(x, index, weight, None if plain else self._added)
        return result

    def _active(self) -> list[str]:
        return [adapter for adapter in self.active_adapters if adapter in self.lora_A]

    def _added(
        self, names: Iterable[str], rows: Tensor, counts: Tensor, product: Product
    ) -> Tensor:
        """What the adapters add to the products of the projections ``names``, side by side."""
        parts = []
        for name in names:
            total = rows.new_zeros(())
            for adapter in self._active():
                a, b = self.lora_A[adapter][name], self.lora_B[adapter][name]
                if product is grouped:
                    # In the dtype of the experts, and of rows that begin at multiples of 16 bytes.
                    a, b = (t.to(self.base_layer.down_proj.dtype) for t in (a, b))
                    spare = -a.shape[1] % 8
                    a, b = F.pad(a, (0, 0, 0, spare)), F.pad(b, (0, spare))
                inner = product(self.lora_dropout[adapter](rows).to(a.dtype), a, counts)
                total = total + product(inner, b, counts) * self.scaling[adapter]
            parts.append(total)
        return torch.cat(parts, dim=-1)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the experts' weights, as PEFT asks."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_A:
                self._move(adapter, 1, safe=safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take them out again, to rounding."""
        while self.merged_adapters:
            self._move(self.merged_adapters.pop(), -1, safe=False)

    @torch.no_grad()
    def _move(self, adapter: str, sign: int, *, safe: bool) -> None:
        factors = self.lora_A[adapter], self.lora_B[adapter]
        a, b = (
            {name: t.float() if t.itemsize < 4 else t for name, t in f.items()} for f in factors
        )
        change = {name: b[name] @ a[name] * (sign * self.scaling[adapter]) for name in PROJECTIONS}
        base = self.base_layer
        both = torch.cat((change["gate_proj"], change["up_proj"]), dim=1)
        moved = [
            (weight, weight + delta.to(weight.dtype))
            for weight, delta in ((base.gate_up_proj, both), (base.down_proj, change["down_proj"]))
        ]
        if safe and not all(bool(new.isfinite().all()) for _, new in moved):
            raise ValueError(
                f"NaNs detected in the merged weights: the adapter {adapter} is broken"
            )
        for weight, new in moved:
            weight.copy_(new)


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors under the names of files, an expert's each, from those in memory."""
    result = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            result[name] = tensor
            continue
        for number, factor in enumerate(tensor):
            key = f"{match[1]}.{number}.{match[3]}_proj.{match[2]}.weight"
            result[key] = factor.clone()
    return result


def together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`separate`.

    Raises:
        ValueError: an expert is left out, or its factors have another shape than the others'.
    """
    found: dict[str, dict[int, Tensor]] = {}
    result = {}
    for name, tensor in tensors.items():
        match = _OF_EXPERT.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            key = f"{match[1]}.{match[4]}.{match[3]}_proj"
            found.setdefault(key, {})[int(match[2])] = tensor
    for key, factors in found.items():
        every = [factors.get(number) for number in range(max(factors) + 1)]
        given = [factor for factor in every if factor is not None]
        shapes = sorted({tuple(factor.shape) for factor in given})
        if len(given) < len(every) or len(shapes) > 1:
            raise ValueError(
                f"{key}: {len(given)} of {len(every)} experts have factors, of shapes {shapes}; "
                "all of a layer need them, of one rank"
            )
        result[key] = torch.stack(given)
    return result


def on_experts(names: Iterable[str]) -> bool:
    """Whether factors of files called ``names`` are of routed experts."""
    return any(_OF_EXPERT.fullmatch(name) for name in names)


def targets_experts(config: LoraConfig) -> bool:
    """Whether an expression among the targets names routed experts, which are not excluded."""
    targets, one = config.target_modules, "model.layers.1.mlp.experts.0.up_proj"
    named = isinstance(targets, str) and re.fullmatch(targets, one) is not None
    return named and re.fullmatch(pattern(config.exclude_modules), one) is None


def stacked_targets(config: LoraConfig, model: nn.Module) -> None:
    """Have ``config`` also target the experts of ``model``, which are stacked, by
    :class:`LoraExperts`.

    Raises:
        ValueError: it gives experts a rank or scale of their own, or leaves layers out.
    """
    for option in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, option)
        for name in _names(model) if keys else ():
            key = get_pattern_key(keys, name)
            if key in keys:
                raise ValueError(
                    f"{option} has {key!r}, which names {name}: adapters on routed experts have "
                    "one rank and one alpha, expected a pattern that leaves experts out"
                )
    if config.layers_to_transform is not None:
        raise ValueError(
            f"layers_to_transform is {config.layers_to_transform}: adapters on routed experts "
            "are on all layers, expected null"
        )
    config._register_custom_module({Experts: LoraExperts})
    separate_targets(config)
    config.target_modules = f"{pattern(config.target_modules)}|{_STACKED}"


def _names(model: nn.Module) -> Iterator[str]:
    """Of the experts of ``model``, in memory and in files."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield name
            for number in range(len(module.down_proj)):
                yield from (f"{name}.{number}.{part}" for part in PROJECTIONS)


def separate_targets(config: LoraConfig) -> None:
    """The reverse of :func:`stacked_targets`: the targets of files."""
    if isinstance(config.target_modules, str):
        config.target_modules = config.target_modules.removesuffix(f"|{_STACKED}")


def pattern(targets: str | Iterable[str] | None) -> str:
    """PEFT's ``target_modules`` as an expression for whole names."""
    if isinstance(targets, str):
        return targets
    names = "|".join(re.escape(name) for name in sorted(targets or ()))
    return rf"(?:.*\.)?(?:{names})"
