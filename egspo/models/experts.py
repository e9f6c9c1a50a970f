"""Mixtures of experts: stacked weights, routers in float32, and the official names of both.

Checkpoints have a matrix per expert; here the experts of a layer are stacked, which transformers'
weight converters do at load and undo at save.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from egspo.models.routes import Routes
from egspo.models.transformer import StrictPreTrainedModel

IMPLEMENTATIONS = ("eager", "grouped_mm")

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of rows and the experts' matrices, as :func:`eager`."""
Added = Callable[[Sequence[str], Tensor, Tensor, Product], Tensor]
"""Of the names of projections, their rows, how many are each expert's, and how to multiply."""


def register_experts(model_type: str) -> None:
    """Tell transformers how checkpoints of ``model_type`` become stacked, and back."""
    register_checkpoint_conversion_mapping(
        model_type,
        [
            WeightConverter(
                source_patterns=[
                    "mlp.experts.*.gate_proj.weight",
                    "mlp.experts.*.up_proj.weight",
                ],
                target_patterns="mlp.experts.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                source_patterns="mlp.experts.*.down_proj.weight",
                target_patterns="mlp.experts.down_proj",
                operations=[MergeModulelist(dim=0)],
            ),
        ],
        overwrite=True,
    )


_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of a module's state, from those of a checkpoint.

    Raises:
        ValueError: an expert lacks one of its three matrices.
    """
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    result = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            experts = found.setdefault(match[1], {})
            experts.setdefault(int(match[2]), {})[match[3]] = tensor
    for prefix, experts in found.items():
        every = [experts.get(n, {}) for n in range(max(experts) + 1)]
        for n, expert in enumerate(every):
            lacking = sorted({"gate", "up", "down"} - set(expert))
            if lacking:
                raise ValueError(f"{prefix}.{n} lacks {lacking}")
        result[f"{prefix}.gate_up_proj"] = torch.stack(
            [torch.cat((expert["gate"], expert["up"])) for expert in every]
        )
        result[f"{prefix}.down_proj"] = torch.stack([expert["down"] for expert in every])
    return result


class Experts(nn.Module):
    """E gated MLPs of width F, whose weights are stacked.

    ``config._experts_implementation`` chooses ``eager`` (a product per expert) or ``grouped_mm``
    (one grouped product); None takes ``grouped_mm`` on a GPU.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        count, width = config.num_experts, config.hidden_size
        hidden = config.moe_intermediate_size
        self.config = config
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, hidden))

    @property
    def active_parameters(self) -> int:
        """Of the experts that a token goes through."""
        one = self.gate_up_proj.shape[1] * self.gate_up_proj.shape[2] + self.down_proj[0].numel()
        return int(self.config.num_experts_per_tok) * one

    @property
    def weight(self) -> Tensor:
        """For PEFT, which asks a module that it adapts for the device of its weight, and puts the
        weight back when it takes the adapter off."""
        return self.gate_up_proj.detach()

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        assert weight.data_ptr() == self.gate_up_proj.data_ptr()

    def forward(
        self, x: Tensor, index: Tensor, weight: Tensor, added: Added | None = None
    ) -> Tensor:
        """``x`` [N, D] through its experts.

        Args:
            x: [N, D].
            index: int64 [N, K], experts of each row.
            weight: [N, K], of their outputs.
            added: what adapters add to the products of some projections, side by side.
        """
        per_row = index.shape[1]
        order = index.flatten().argsort(stable=True)
        counts = torch.bincount(index.flatten(), minlength=self.gate_up_proj.shape[0])
        rows = x[order // per_row]
        chosen = self.config._experts_implementation
        if chosen is None:
            chosen = "grouped_mm" if x.is_cuda else "eager"
        product = grouped if chosen == "grouped_mm" else eager
        both = product(rows, self.gate_up_proj, counts)
        if added is not None:
            both = (both + added(("gate_proj", "up_proj"), rows, counts, product)).to(both.dtype)
        gate, up = both.chunk(2, dim=-1)
        inner = F.silu(gate) * up
        result = product(inner, self.down_proj, counts)
        if added is not None:
            result = (result + added(("down_proj",), inner, counts, product)).to(result.dtype)
        # Back in the order of the rows: a sum of K terms in a fixed order.
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        result = result[back].view(*index.shape, -1) * weight[:, :, None]
        return result.sum(1).to(x.dtype)


def eager(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows [N, D], sorted by expert, times the experts' matrices [E, F, D]: [N, F]."""
    matrices = weight.unbind()
    parts = torch.split(rows, counts.tolist())
    products = [F.linear(part, matrices[e]) for e, part in enumerate(parts) if len(part)]
    return torch.cat(products)


def grouped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same in one product."""
    ends = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows.to(weight.dtype), weight.transpose(1, 2), offs=ends)


class Router(nn.Module):
    """Which experts a row goes to, in float32 whatever the model's dtype."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    @property
    def active_parameters(self) -> int:
        """All of them."""
        return self.weight.numel()

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Experts int64 [N, K] that are chosen for rows [N, D], and weights [N, K] in the rows'
        dtype: theirs, or those of the experts ``given``, int64 [N, K], that are taken instead."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            scores = self._scores(F.linear(x.to(dtype), self.weight.to(dtype)))
            index = self._choice(scores)
            weight = self._weights(scores.gather(-1, index if given is None else given))
        return index, weight.to(x.dtype)

    def _scores(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def _choice(self, scores: Tensor) -> Tensor:
        """int64 [N, K], the best first."""
        raise NotImplementedError

    def _weights(self, chosen: Tensor) -> Tensor:
        """Of the scores of the chosen experts, [N, K]."""
        raise NotImplementedError


class SoftmaxRouter(Router):
    """The K most probable experts, by a softmax over all."""

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def _choice(self, scores: Tensor) -> Tensor:
        return scores.topk(self.config.num_experts_per_tok, dim=-1).indices

    def _weights(self, chosen: Tensor) -> Tensor:
        return chosen / chosen.sum(-1, keepdim=True) if self.config.norm_topk_prob else chosen


class GroupedRouter(Router):
    """K experts of the best groups, by sigmoid scores and a bias that only the choice sees.

    The weights are the scores themselves. ``expert_bias`` balances the load of pre-training: it is
    a buffer, and no gradient reaches it.
    """

    expert_bias: Tensor

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def _choice(self, scores: Tensor) -> Tensor:
        config = self.config
        choice = torch.unflatten(scores + self.expert_bias, -1, (config.n_group, -1))
        groups = choice.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        kept = torch.zeros_like(choice[..., 0], dtype=torch.bool).scatter(-1, groups, True)
        choice = choice.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
        return choice.topk(config.num_experts_per_tok, dim=-1).indices

    def _weights(self, chosen: Tensor) -> Tensor:
        if self.config.norm_topk_prob:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        weights: Tensor = chosen * self.config.routed_scaling_factor
        return weights


class MixtureOfExperts(nn.Module):
    """A router, its experts, and the experts that every row goes through, if any.

    Args:
        config: sizes.
        gate: the router.
        shared: None for none.
        layer: number among the layers with experts.
    """

    def __init__(
        self, config: PretrainedConfig, gate: Router, shared: nn.Module | None, layer: int
    ) -> None:
        super().__init__()
        self.layer = layer
        self.gate = gate
        self.experts = Experts(config)
        if shared is not None:
            self.shared_experts = shared

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        """``x`` [B, N, D]; its experts go into ``routes``, or come from there."""
        rows = x.flatten(0, 1)
        given = None
        if routes is not None and routes.given is not None:
            given = routes.given[:, :, self.layer].flatten(0, 1).long()
        index, weight = self.gate(rows, given)
        if routes is not None:
            routes.chosen[self.layer] = index.view(*x.shape[:2], -1)
        taken = index if given is None else given
        result: Tensor = self.experts(rows, taken, weight).view_as(x)
        if hasattr(self, "shared_experts"):
            result = result + self.shared_experts(x)
        return result


def fed(mlp: nn.Module, x: Tensor, routes: Routes | None) -> Tensor:
    """``x`` [B, N, D] through the MLP or the experts of a layer."""
    result: Tensor = mlp(x, routes) if isinstance(mlp, MixtureOfExperts) else mlp(x)
    return result


class MixturePreTrainedModel(StrictPreTrainedModel):  # type: ignore[no-untyped-call, unused-ignore]
    """What transformers needs to know of a model with experts."""

    # Rounded to bfloat16, a bias would choose other experts.
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012 - as transformers declares it

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> Any:
        """None, for the choice by device, or one of :data:`IMPLEMENTATIONS`."""
        if requested_experts not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"experts_implementation must be one of {IMPLEMENTATIONS}, or None to choose by "
                f"device, got {requested_experts!r}"
            )
        return requested_experts

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Experts | Router):
            for parameter in module.parameters(recurse=False):
                if not getattr(parameter, "_is_hf_initialized", False):
                    parameter.normal_(std=self.config.initializer_range)
            if isinstance(module, GroupedRouter) and not getattr(
                module.expert_bias, "_is_hf_initialized", False
            ):
                module.expert_bias.zero_()
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call, unused-ignore]


def freeze_routers(model: nn.Module) -> None:
    """Keep the choice of experts from being trained; without routers, nothing changes."""
    for module in model.modules():
        if isinstance(module, Router):
            module.requires_grad_(False)


def routed_layers(model: nn.Module) -> int:
    """Layers with experts."""
    return sum(isinstance(module, MixtureOfExperts) for module in model.modules())
