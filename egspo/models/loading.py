"""Models and tokenizers from checkpoints, and new models."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from egspo.models.dream import DreamForMaskedLM
from egspo.models.folders import check_amount, check_folder, readable
from egspo.models.llada import LLaDAForMaskedLM
from egspo.models.llada2 import LLaDA2ForMaskedLM
from egspo.models.sdar import SDARForMaskedLM, SDARMoeForMaskedLM
from egspo.models.transformer import TransformerForMaskedLM

_MODELS: tuple[type[TransformerForMaskedLM], ...] = (
    DreamForMaskedLM,
    LLaDAForMaskedLM,
    LLaDA2ForMaskedLM,
    SDARForMaskedLM,
    SDARMoeForMaskedLM,
)
DEFAULT_MODEL_TYPE = LLaDAForMaskedLM.config_class.model_type


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
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2`` or, with blocks,
            ``flex_attention``.
        kwargs: for ``from_pretrained``, for example ``device_map``, ``quantization_config``,
            ``revision``.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is of another architecture (raised before weights are read), or its
            tensors do not fit (the message names them).
    """
    check_folder(path_or_id)
    hub = {
        k: kwargs[k] for k in ("revision", "cache_dir", "token", "local_files_only") if k in kwargs
    }
    model_class = _class_of(path_or_id, **hub)
    if dtype is not None:
        kwargs["dtype"] = dtype
    if Path(path_or_id).is_dir() and not kwargs.get("quantization_config"):
        described = model_on_meta(load_config(path_or_id))
        check_amount(path_or_id, sum(p.numel() for p in described.parameters()))
    with readable(path_or_id):
        model: Any = model_class.from_pretrained(
            os.fspath(path_or_id), attn_implementation=attn_implementation, **kwargs
        )
    loaded: PreTrainedModel = model
    return loaded


def load_config(path_or_id: str | os.PathLike[str], **hub: Any) -> PretrainedConfig:
    """The configuration of a checkpoint, whose weights need not be there.

    Args:
        path_or_id: folder with ``config.json``, or a name on the hub.
        hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model`.
    """
    check_folder(path_or_id)
    config_class = _class_of(path_or_id, **hub).config_class
    assert config_class is not None
    with readable(path_or_id):
        config: PretrainedConfig = config_class.from_pretrained(path_or_id, **hub)
    return config


def model_on_meta(config: PretrainedConfig) -> TransformerForMaskedLM:
    """The model that ``config`` (of a supported class) describes, without memory for weights.

    Nothing is computed with it, so the attention implementation that a checkpoint names need not
    be installed.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return _by_type(config.model_type)(config)


def new_config(fields: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a new model.

    Args:
        fields: ``model_type`` (LLaDA if left out), and fields of its configuration in its names
            or those of transformers.

    Raises:
        ValueError: the type or a field is unknown, or a value out of range.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", DEFAULT_MODEL_TYPE)
    config_class: Any = _by_type(model_type).config_class
    known = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"unknown fields for a new {config_class.model_type} model: {unknown}")
    config: PretrainedConfig = config_class(**fields)
    return config


def new_model(config: Mapping[str, Any], seed: int) -> TransformerForMaskedLM:
    """A model with random float32 weights on the CPU.

    Args:
        config: as for :func:`new_config`; the weights are normal with the standard deviation that
            it says (``init_std``, ``initializer_range``).
        seed: the weights are a function of it; the global random state is left alone.

    Raises:
        ValueError: as :func:`new_config`.
    """
    built = new_config(config)
    with seeded(seed), torch.device("cpu"):
        return _by_type(built.model_type)(built)


def set_block_size(config: PretrainedConfig, size: int | None) -> None:
    """Denoise in blocks of ``size``; None keeps the model's own.

    Raises:
        ValueError: the model has no blocks.
    """
    if size is None:
        return
    if getattr(config, "block_size", None) is None:
        raise ValueError(
            f"model.block_size is of block-causal models, and {config.model_type} is none: "
            f"leave it out, got {size}"
        )
    config.block_size = size


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
    check_folder(path_or_id)
    folder = Path(path_or_id)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        raise FileNotFoundError(f"no tokenizer at {os.fspath(path_or_id)!r}: it has no such files")
    try:
        # False, not the default: that one asks the user, and a y runs what is in the folder.
        with readable(path_or_id):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path_or_id, trust_remote_code=False
            )
            for name in ("mask", "eos", "pad", "unk"):  # recursion, for a token that is not there
                getattr(tokenizer, f"{name}_token_id")
            tokenizer("")  # as damaged files cannot
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


def _class_of(path_or_id: str | os.PathLike[str], **hub: Any) -> type[TransformerForMaskedLM]:
    return _by_type(_read_config(path_or_id, **hub).get("model_type"), path_or_id)


def _by_type(
    model_type: object, checkpoint: str | os.PathLike[str] | None = None
) -> type[TransformerForMaskedLM]:
    """The class of a ``model_type``, in upper or lower case: both are found in checkpoints."""
    known = {str(cls.config_class.model_type): cls for cls in _MODELS if cls.config_class}
    for name, cls in known.items():
        if isinstance(model_type, str) and model_type.lower() == name.lower():
            return cls
    if checkpoint is None:
        raise ValueError(f"new models are of model_type {sorted(known)}, got {model_type!r}")
    raise ValueError(
        f"{os.fspath(checkpoint)} is a checkpoint of model_type {model_type!r}; "
        f"supported are {sorted(known)}"
    )


def _read_config(path_or_id: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
    try:
        with readable(path_or_id):
            fields, _ = PretrainedConfig.get_config_dict(path_or_id, **kwargs)
    except OSError as error:
        raise FileNotFoundError(f"no model at {os.fspath(path_or_id)!r}: {error}") from error
    if not fields:  # a folder without config.json
        raise FileNotFoundError(f"no model at {os.fspath(path_or_id)!r}: it has no config.json")
    return dict(fields)


def _config_beside(path_or_id: str | os.PathLike[str]) -> PretrainedConfig | None:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
    except (OSError, ValueError):  # no config.json, or one that does not describe a model
        return None
    return config
