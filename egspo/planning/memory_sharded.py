"""Memory of weights, gradients and optimizer state where a process keeps a part of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from egspo.config import TrainConfig
from egspo.engines.deepspeed import BUCKET_ELEMENTS
from egspo.planning.memory_items import MemoryItem

SHARDED = ("fsdp2", "zero2", "zero3")
"""Engines that divide weights, or what goes with them, over the processes."""

# A block is gathered while the one before it is computed with.
_BLOCKS_AT_ONCE = 2


def sharded_weights(config: TrainConfig, model: Any, processes: int) -> list[MemoryItem]:
    """Of one of several processes.

    Args:
        config: of the run, with a sharded engine.
        model: on the meta device, in the dtype of its weights, with its adapter.
        processes: their number.
    """
    sizes = _Bytes.of(model)
    has_copy = config.algorithm.beta > 0 and not config.model.has_adapter
    if config.distributed.engine == "fsdp2":
        return _fsdp2(config, sizes, processes, copies=1 + has_copy)
    items = _deepspeed(sizes, processes, gathers=config.distributed.engine == "zero3")
    if has_copy:
        items.append(MemoryItem("reference policy", sizes.all, "a frozen copy, whole", "always"))
    return items


@dataclass(frozen=True)
class _Bytes:
    """Of a model's weights."""

    all: int
    trained: int
    rest: int
    """Outside the blocks: embeddings, last norm, head."""
    trained_rest: int
    block: int
    trained_block: int
    blocks: int
    """Their number; all are alike."""

    @classmethod
    def of(cls, model: Any) -> _Bytes:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        blocks = list(base.model._layers())
        in_blocks = {id(p) for block in blocks for p in block.parameters()}
        rest = [p for p in model.parameters() if id(p) not in in_blocks]
        return cls(
            all=_bytes(model.parameters()),
            trained=_trained(model.parameters()),
            rest=_bytes(rest),
            trained_rest=_trained(rest),
            block=_bytes(blocks[0].parameters()),
            trained_block=_trained(blocks[0].parameters()),
            blocks=len(blocks),
        )


def _fsdp2(config: TrainConfig, sizes: _Bytes, processes: int, copies: int) -> list[MemoryItem]:
    whole, part = copies * sizes.all, f"1/{processes} of "
    blocks = min(_BLOCKS_AT_ONCE, sizes.blocks) if config.distributed.reshard else sizes.blocks
    at_once = sizes.rest + blocks * sizes.block
    held = whole // processes
    parts = [
        MemoryItem("weights", held, f"{part}their number x their bytes", "always"),
        MemoryItem("optimizer", 2 * sizes.trained // processes, f"{part}2 moments", "always"),
        MemoryItem("gradients", sizes.trained // processes, f"{part}trained weights", "update"),
    ]
    if config.distributed.offload:  # to host memory, but for what a pass is working on
        parts, held = [], 0
    return [
        *parts,
        _gathered(whole - held),
        MemoryItem(
            "gathered weights",
            at_once - (at_once // processes if held else 0),
            f"embeddings, head and {blocks} blocks, but for the parts",
            "update",
        ),
        MemoryItem(
            "whole gradients",
            sizes.trained_rest + sizes.trained_block,
            "of embeddings, head and a block, before they are reduced",
            "update",
        ),
    ]


def _deepspeed(sizes: _Bytes, processes: int, *, gathers: bool) -> list[MemoryItem]:
    part, own = f"1/{processes} of ", sizes.trained // processes
    text = "their number x their bytes"
    weights = MemoryItem("weights", sizes.all, text, "always")
    if gathers:
        weights = MemoryItem("weights", sizes.all // processes, part + text, "always")
    items = [
        weights,
        MemoryItem("weights that are updated", own, f"{part}trained weights", "always"),
        MemoryItem("optimizer", 2 * own, f"{part}2 moments", "always"),
        MemoryItem("gradients", own, f"{part}trained weights", "update"),
        MemoryItem("buckets", 2 * 4 * BUCKET_ELEMENTS, "2 x 4 B an element, at most", "update"),
    ]
    if not gathers:
        return items
    blocks = min(_BLOCKS_AT_ONCE, sizes.blocks)
    at_once = sizes.rest + blocks * sizes.block
    return [
        *items,
        _gathered(sizes.all - sizes.all // processes),
        MemoryItem(
            "gathered weights",
            at_once - at_once // processes,
            f"embeddings, head and {blocks} blocks, but for the parts",
            "update",
        ),
    ]


def _gathered(missing: int) -> MemoryItem:
    text = "what the parts lack of the whole, once for a rollout"
    return MemoryItem("gathered weights", missing, text, "rollout")


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _trained(parameters: Iterable[nn.Parameter]) -> int:
    return _bytes(p for p in parameters if p.requires_grad)
