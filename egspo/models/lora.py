"""Low-rank adapters in PEFT's format, never on the language-model head by accident."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from egspo.models.experts import routed_layers
from egspo.models.folders import check_folder, readable
from egspo.models.loading import seeded
from egspo.models.lora_experts import (
    SEPARATE,
    LoraExperts,
    on_experts,
    pattern,
    separate,
    separate_targets,
    stacked_targets,
    targets_experts,
    together,
)

LORA_TARGETS = (
    r".*\b(?:"
    r"blocks\.\d+\.(?:q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"  # LLaDA
    r"|layers\.\d+\.(?:self_attn\.[qkvo]_proj|attention\.(?:query_key_value|dense))"  # the others
    r"|layers\.\d+\.mlp\.(?:shared_experts\.)?(?:gate|up|down)_proj"
    r")"
)
"""The projections of every block (of attention, of a dense MLP and of a shared expert), matched
against the whole module name. (LLaDA's plain suffix ``ff_out`` would match the head too.)"""


_EXPERTS = r"(?:^|\.)(?:experts(?:\.|$)|gate_up_proj$)"
"""Of the targets that name routed experts, as here or as in checkpoints."""

POLICY_ADAPTER, REFERENCE_ADAPTER = "default", "reference"
"""The adapter that is trained, and a frozen one that the reference policy may have."""


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str] | None = None,
    experts: bool = False,
    seed: int,
) -> PeftModel:
    """Freeze ``model`` and put a new adapter on it, which changes nothing until it is trained.

    Args:
        rank: columns of the low-rank factors.
        alpha: the adapter's output is scaled by ``alpha / rank``.
        dropout: on the adapter's input, in training mode.
        target_modules: names or dotted suffixes of projections in the blocks; None for all.
            The head is never adapted.
        experts: also adapt the projections of all routed experts, each by factors of its own.
        seed: of the random factor; the global random state is left alone.

    Raises:
        TypeError: ``target_modules`` is a string.
        ValueError: ``rank`` or ``dropout`` out of range, a target matches no projection, or there
            are no experts to adapt.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    check_targets(model, target_modules, experts=experts)
    targets = LORA_TARGETS if target_modules is None else list(target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=dropout,
        target_modules=targets,
        exclude_modules=_matched_head(model, targets),
    )
    if experts:
        config.target_modules = f"{pattern(targets)}|{SEPARATE}"
        stacked_targets(config, model)
    with seeded(seed, model.device):
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def check_targets(
    model: PreTrainedModel, target_modules: Sequence[str] | None, *, experts: bool
) -> None:
    """Refuse what :func:`add_lora` would, of the same arguments.

    Raises:
        TypeError: ``target_modules`` is a string.
        ValueError: it is empty or has what is no projection, or there are no experts to adapt.
    """
    if isinstance(target_modules, str):
        raise TypeError(
            f"target_modules must be a list of names, got the string {target_modules!r}"
        )
    if target_modules is not None and not target_modules and not experts:
        raise ValueError("target_modules must name a projection, or be null for all, got []")
    projections = [name for name, _ in model.named_modules() if re.fullmatch(LORA_TARGETS, name)]
    for target in target_modules or ():
        if re.search(_EXPERTS, target):
            raise ValueError(
                f"target_modules has {target!r}: the matrices of routed experts are stacked, and "
                "adapted together by experts: true; those of shared experts are "
                "shared_experts.up_proj and so on"
            )
        if not any(_is_suffix(target, name) for name in projections):
            known = dict.fromkeys(re.sub(r".*\.\d+\.", "", name) for name in projections)
            raise ValueError(
                f"target_modules has {target!r}, which names no projection of a block; "
                f"{type(model).__name__} has {', '.join(known)}"
            )
    if experts and not routed_layers(model):
        raise ValueError(
            f"experts is of models with routed experts; {type(model).__name__} has none"
        )


def load_adapter(
    model: PreTrainedModel, path: str | os.PathLike[str], trainable: bool = False
) -> PeftModel:
    """Put a saved adapter on ``model``.

    Adapters that target the suffix ``ff_out`` name the head too; it is adapted only if the file
    has weights for it.

    Args:
        model: the base, whose weights are frozen.
        path: folder, or name on the hub, with ``adapter_config.json`` and the weights.
        trainable: whether the adapter's weights require gradients.

    Raises:
        ValueError: no adapter at ``path``, not a LoRA adapter, or tensors missing, unknown or of
            another shape (the message names them; ``model`` is left without adapter). Of routed
            experts, all of a layer are adapted or none.
    """
    path = os.fspath(path)
    check_folder(path)
    with readable(path):
        config = PeftConfig.from_pretrained(path)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{path} is an adapter of type {config.peft_type}, expected LoRA")
    with readable(path):
        weights = load_peft_weights(path, device="cpu")
    head = _matched_head(model, config.target_modules)
    if head is not None and not any(f".{head[0]}.lora_" in key for key in weights):
        config.exclude_modules = _joined(config.exclude_modules, head[0])
    if routed_layers(model) and (on_experts(weights) or targets_experts(config)):
        stacked_targets(config, model)
        weights = together(weights)
    config.inference_mode = not trainable
    with seeded(0, model.device):  # the initial values drawn here are all overwritten
        adapted = PeftModel(model, config)
    problem = _difference(weights, adapted)
    if problem:
        adapted.unload()
        raise ValueError(f"the adapter {path} does not fit {type(model).__name__}: {problem}")
    set_peft_model_state_dict(adapted, weights)
    return adapted


def save_adapter(
    model: PeftModel, folder: str | os.PathLike[str], weights: dict[str, Tensor] | None = None
) -> None:
    """Write the adapter that is trained, and it alone: ``folder`` is a plain adapter.

    Args:
        model: whose adapter it is.
        folder: where.
        weights: by name, where ``model`` itself has parts of them only.
    """
    config = model.peft_config[POLICY_ADAPTER]
    assert isinstance(config, LoraConfig)
    targets = config.target_modules
    separate_targets(config)
    try:
        model.save_pretrained(
            os.fspath(folder), selected_adapters=[POLICY_ADAPTER], state_dict=weights
        )
    finally:
        config.target_modules = targets
    if any(isinstance(module, LoraExperts) for module in model.modules()):
        file = Path(folder, SAFETENSORS_WEIGHTS_NAME)
        written = load(file.read_bytes())  # not mapped: the file is about to be another
        save_file(separate(written), file, metadata={"format": "pt"})


def add_reference_adapter(model: PeftModel) -> None:
    """Put a second adapter beside the one of ``model``, frozen and not active: a copy of it.

    Of a new adapter it changes nothing, as its second factors are zero.
    """
    config = copy.deepcopy(model.peft_config[POLICY_ADAPTER])
    config.inference_mode = True
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with seeded(0, next(model.parameters()).device):  # what is drawn here is overwritten
        model.add_adapter(REFERENCE_ADAPTER, config)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    policy, reference = reference_factors(model)
    for name, factor in reference.items():
        factor.requires_grad_(False)
        factor.detach().copy_(policy[name])


def reference_factors(model: PeftModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the two adapters by the name of the one that is trained."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    policy = {name: p for name, p in weights.items() if f".{POLICY_ADAPTER}." in name}
    there = f".{REFERENCE_ADAPTER}."
    return policy, {n: weights[n.replace(f".{POLICY_ADAPTER}.", there)] for n in policy}


def is_of_reference(name: str) -> bool:
    """Whether a module or parameter called ``name`` is of the reference policy's adapter."""
    return REFERENCE_ADAPTER in name.split(".")


@contextmanager
def reference_mode(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Inside, ``model`` computes what it would without its adapter, or with ``adapter`` instead.

    Raises:
        TypeError: ``model`` has no adapter.
        ValueError: it has none called ``adapter``.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a model with an adapter (PeftModel), got {type(model).__name__}")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if adapter is not None and adapter not in model.peft_config:
        raise ValueError(f"the model has no adapter {adapter!r}, only {list(model.peft_config)}")
    active = model.active_adapter
    try:
        if adapter is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(adapter)
            yield
    finally:
        if adapter is not None:
            model.set_adapter(active)
        # PEFT makes the adapters that it switches on trainable, whether or not they were.
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matched_head(model: PreTrainedModel, targets: object) -> list[str] | None:
    """The head's name, in a list, if ``targets`` (PEFT's ``target_modules``) match it."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or isinstance(head, nn.Embedding):
        return None
    if isinstance(targets, str):
        matched = re.fullmatch(targets, name) is not None
    else:
        matched = any(_is_suffix(target, name) for target in targets or ())  # type: ignore[attr-defined]
    return [name] if matched else None


def _joined(excluded: list[str] | str | None, name: str) -> list[str] | str:
    if isinstance(excluded, str):
        return f"(?:{excluded})|{re.escape(name)}"
    return [*(excluded or ()), name]


def _difference(weights: dict[str, Tensor], adapted: PeftModel) -> str:
    """What keeps ``weights`` from being the adapter of ``adapted``; empty if nothing."""
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    shared = sorted(set(weights) & set(expected))
    problems = {
        "missing": sorted(set(expected) - set(weights)),
        "unknown": sorted(set(weights) - set(expected)),
        "mis-shaped": [
            f"{key} {list(weights[key].shape)}, expected {list(expected[key].shape)}"
            for key in shared
            if weights[key].shape != expected[key].shape
        ],
    }
    return "; ".join(f"{kind} {', '.join(keys[:8])}" for kind, keys in problems.items() if keys)
