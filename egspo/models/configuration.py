"""Checks that configurations of all models make of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers import PretrainedConfig

MOST, MOST_LAYERS = 2**31 - 1, 1000
"""Of a size, and of blocks: beyond it a configuration is damaged, and building it would not end."""


def check_fixed(config: PretrainedConfig, fixed: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse a configuration that describes a function which is not implemented.

    Args:
        config: the configuration; a field that it does not have is as it should be.
        fixed: allowed values by name, the usual one first.

    Raises:
        ValueError: naming the field.
    """
    for name, allowed in fixed.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{type(config).__name__}.{name} must be {allowed[0]!r}, got {value!r}"
            )


def check_ranges(
    config: PretrainedConfig,
    *,
    positive: Iterable[str],
    dropouts: Iterable[str],
    width: str | None,
    heads: str,
    kv_heads: str,
) -> None:
    """Refuse sizes that no transformer can have.

    Args:
        config: the configuration.
        positive: fields that must be integers of at least 1.
        dropouts: fields that must be in [0, 1).
        width, heads, kv_heads: names of the fields that must divide one another; ``width`` is None
            where ``head_dim`` is a field of its own.

    Raises:
        ValueError: naming the field.
    """
    kind = type(config).__name__
    for name in positive:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{kind}.{name} must be an integer >= 1, got {value!r}")
        most = MOST_LAYERS if "layers" in name else MOST
        if value > most:
            raise ValueError(f"{kind}.{name} is {value}, no model has more than {most}")
    for name in dropouts:
        value = getattr(config, name)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{kind}.{name} must be in [0, 1), got {value!r}")
    count, kv_count = (getattr(config, name) for name in (heads, kv_heads))
    size = None if width is None else getattr(config, width)
    if width is None and config.head_dim % 2:
        raise ValueError(
            f"{kind}.head_dim must be even (rotary embeddings pair the dimensions of a head), got "
            f"{config.head_dim}"
        )
    if size is not None and (size % count or size // count % 2):
        raise ValueError(
            f"{kind}.{width} must be an even multiple of {heads} (rotary embeddings pair the "
            f"dimensions of a head), got {width}={size}, {heads}={count}"
        )
    if count % kv_count:
        raise ValueError(f"{kind}.{kv_heads} must divide {heads}={count}, got {kv_count}")


def check_experts(config: PretrainedConfig, groups: str | None = None) -> None:
    """Refuse a choice of experts that cannot be made.

    Args:
        config: with ``num_experts`` and ``num_experts_per_tok``.
        groups: name of the number of groups, where experts are chosen from the best
            ``topk_group`` of them; None for a choice from all.

    Raises:
        ValueError: naming the field.
    """
    kind, count, chosen = type(config).__name__, config.num_experts, config.num_experts_per_tok
    most = count
    if groups is not None:
        number, kept = getattr(config, groups), config.topk_group
        if count % number or count // number < 2:
            raise ValueError(
                f"{kind}.{groups} must divide num_experts={count} into groups of two or more, "
                f"got {number}"
            )
        if kept > number:
            raise ValueError(f"{kind}.topk_group must be <= {groups}={number}, got {kept}")
        most = count // number * kept
    if chosen > most:
        raise ValueError(f"{kind}.num_experts_per_tok must be <= {most}, got {chosen}")
