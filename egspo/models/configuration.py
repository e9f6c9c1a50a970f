"""Checks that configurations of all models make of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers import PretrainedConfig


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
    width: str,
    heads: str,
    kv_heads: str,
) -> None:
    """Refuse sizes that no transformer can have.

    Args:
        config: the configuration.
        positive: fields that must be integers of at least 1.
        dropouts: fields that must be in [0, 1).
        width, heads, kv_heads: names of the fields that must divide one another.

    Raises:
        ValueError: naming the field.
    """
    kind = type(config).__name__
    for name in positive:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{kind}.{name} must be an integer >= 1, got {value!r}")
    for name in dropouts:
        value = getattr(config, name)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{kind}.{name} must be in [0, 1), got {value!r}")
    size, count, kv_count = (getattr(config, name) for name in (width, heads, kv_heads))
    if size % count or size // count % 2:
        raise ValueError(
            f"{kind}.{width} must be an even multiple of {heads} (rotary embeddings pair the "
            f"dimensions of a head), got {width}={size}, {heads}={count}"
        )
    if count % kv_count:
        raise ValueError(f"{kind}.{kv_heads} must divide {heads}={count}, got {kv_count}")
