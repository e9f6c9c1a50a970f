"""The decoder of a model: what its architecture allows, and what a recipe asks for."""

from __future__ import annotations

from egspo.config import GenerationConfig
from egspo.rollouts.causal import CausalDecoder
from egspo.rollouts.decoder import Decoder
from egspo.rollouts.denoiser import Denoiser

Decoding = Decoder | CausalDecoder


def decoder_of(
    denoiser: Denoiser, config: GenerationConfig, *, detach_cache: bool = False
) -> Decoding:
    """The decoder of ``config`` for the model of ``denoiser``.

    Raises:
        ValueError: as :func:`check_decoding`.
    """
    check_decoding(config, denoiser.block_size)
    if denoiser.block_size is not None:
        return CausalDecoder(denoiser, denoiser.block_size)
    return Decoder(denoiser, config.block_length, config.cache, config.guidance, detach_cache)


def check_decoding(config: GenerationConfig, block_size: int | None) -> None:
    """Refuse options that a block-causal model has no meaning for.

    Args:
        config: of the generation.
        block_size: of the model; None where attention has no direction.

    Raises:
        ValueError: naming the option.
    """
    if block_size is None:
        return
    if config.block_length != block_size:
        raise ValueError(
            f"generation.block_length must be the block size of the model, {block_size} "
            f"(model.block_size sets another), got {config.block_length}"
        )
    if config.cache != "none":
        raise ValueError(
            f"generation.cache: {config.cache} is of models with full attention; the cache of a "
            "block-causal model is always used, and exact: leave it at none"
        )
    if config.guidance:
        raise ValueError(
            f"generation.guidance is not implemented for block-causal models, got {config.guidance}"
        )
