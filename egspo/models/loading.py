"""Models and tokenizers from checkpoints, and new models."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from egspo.models.llada import LLaDAConfig, LLaDAForMaskedLM

# By ``model_type`` of config.json.
_MODELS: dict[str, type[PreTrainedModel]] = {LLaDAConfig.model_type: LLaDAForMaskedLM}


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a role in masked diffusion."""

    mask: int
    eos: int
    pad: int


def load_model(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    **kwargs: Any,
) -> PreTrainedModel:
    """A masked diffusion model from a local folder or the hub, in evaluation mode.

    Args:
        path_or_id: folder with ``config.json`` and weights, or a name on the hub.
        dtype: of the weights; None for the checkpoint's.
        attn_implementation: ``sdpa``, ``eager`` or ``flash_attention_2``.
        kwargs: for ``from_pretrained``, for example ``device_map``, ``quantization_config``,
            ``revision``.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is of another architecture (raised before weights are read), or its
            tensors do not fit (the message names them).
    """
    hub = {
        k: kwargs[k] for k in ("revision", "cache_dir", "token", "local_files_only") if k in kwargs
    }
    fields = _read_config(path_or_id, **hub)
    model_type = fields.get("model_type")
    if model_type not in _MODELS:
        raise ValueError(
            f"{path_or_id} is a checkpoint of model_type {model_type!r}; "
            f"supported are {sorted(_MODELS)}"
        )
    if dtype is not None:
        kwargs["dtype"] = dtype
    model: PreTrainedModel = _MODELS[model_type].from_pretrained(
        path_or_id, attn_implementation=attn_implementation, **kwargs
    )
    return model


def new_model(config: Mapping[str, Any], seed: int) -> LLaDAForMaskedLM:
    """A LLaDA model with random float32 weights on the CPU, normal of ``config["init_std"]``.

    Args:
        config: fields of :class:`LLaDAConfig`, in its names or those of transformers.
        seed: the weights are a function of it; the global random state is left alone.

    Raises:
        ValueError: a field is unknown or has a value out of range.
    """
    fields = dict(config)
    model_type = fields.pop("model_type", LLaDAConfig.model_type)
    if model_type not in _MODELS:
        raise ValueError(f"new models are of model_type {sorted(_MODELS)}, got {model_type!r}")
    known = {f.name for f in dataclasses.fields(LLaDAConfig)} | set(LLaDAConfig.attribute_map)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"unknown fields for a new LLaDA model: {unknown}")
    with seeded(seed), torch.device("cpu"):
        return LLaDAForMaskedLM(LLaDAConfig(**fields))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, the CPU's random state, and that of ``device``, come from ``seed``.

    The states from before are restored at the end, and no other device is touched.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


def load_tokenizer(
    path_or_id: str | os.PathLike[str], config: PretrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with its mask token set.

    Official LLaDA tokenizers contain the mask token without saying which it is; the model's
    configuration does.

    Args:
        path_or_id: local folder or a name on the hub.
        config: of the model; None for the one beside the tokenizer, if there is one.

    Raises:
        FileNotFoundError: there is no such tokenizer.
        ValueError: neither tokenizer nor configuration names a mask token, or the tokenizer has
            no token of the configuration's id.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path_or_id)
    except OSError as error:
        raise FileNotFoundError(f"no tokenizer at {os.fspath(path_or_id)!r}: {error}") from error
    if tokenizer.mask_token_id is not None:
        return tokenizer
    mask_id = getattr(config or _config_beside(path_or_id), "mask_token_id", None)
    if mask_id is None:
        raise ValueError(
            f"the tokenizer {os.fspath(path_or_id)!r} has no mask token, and no model "
            "configuration says which of its tokens it is (mask_token_id)"
        )
    # Slow tokenizers raise, fast ones give None.
    token = tokenizer.convert_ids_to_tokens(mask_id) if 0 <= mask_id < len(tokenizer) else None
    if token is None:
        raise ValueError(
            f"mask_token_id {mask_id} is no token of the tokenizer {os.fspath(path_or_id)!r}, "
            f"which has {len(tokenizer)}"
        )
    tokenizer.mask_token = token
    return tokenizer


def special_token_ids(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> SpecialTokens:
    """Mask, EOS and padding ids; the model's configuration decides, the tokenizer fills gaps.

    Padding falls back to EOS, as in LLaDA.

    Raises:
        ValueError: an id is unknown, not a token of the model's vocabulary, mask and EOS or mask
            and padding are the same token, or model and tokenizer disagree on the mask.
    """
    mask, eos, pad = (_token_id(tokenizer, config, name) for name in ("mask", "eos", "pad"))
    pad = eos if pad is None else pad
    if mask is None or eos is None or pad is None:
        missing = "mask" if mask is None else "eos"
        raise ValueError(
            f"neither the model's configuration nor the tokenizer has a {missing} token"
        )
    for name, value in (("mask", mask), ("eos", eos), ("pad", pad)):
        if not 0 <= value < config.vocab_size:
            raise ValueError(
                f"{name}_token_id {value} is outside the vocabulary of {config.vocab_size} tokens"
            )
        if name != "mask" and value == mask:
            raise ValueError(f"mask_token_id and {name}_token_id must differ, both are {mask}")
    if tokenizer.mask_token_id not in (None, mask):
        raise ValueError(
            f"the model's mask_token_id is {mask}, the tokenizer's {tokenizer.mask_token_id}"
        )
    return SpecialTokens(mask=mask, eos=eos, pad=pad)


def _token_id(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, name: str
) -> int | None:
    value = getattr(config, f"{name}_token_id", None)
    if isinstance(value, list):  # several ends of text: the first is the one that fills
        value = value[0] if value else None
    if value is None:
        value = getattr(tokenizer, f"{name}_token_id")
    return None if value is None else int(value)


def _read_config(path_or_id: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
    try:
        fields, _ = PretrainedConfig.get_config_dict(path_or_id, **kwargs)
    except OSError as error:
        raise FileNotFoundError(f"no model at {os.fspath(path_or_id)!r}: {error}") from error
    if not fields:  # a folder without config.json
        raise FileNotFoundError(f"no model at {os.fspath(path_or_id)!r}: it has no config.json")
    return dict(fields)


def _config_beside(path_or_id: str | os.PathLike[str]) -> PretrainedConfig | None:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path_or_id)
    except (OSError, ValueError):  # no config.json, or one that does not describe a model
        return None
    return config
