"""``egspo sft``, and the warm start of a new model: supervised once, then cached by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from egspo.build import (
    Data,
    base_model,
    build_data,
    check_data,
    fresh_model,
    plain_denoiser,
    trainable_model,
)
from egspo.checkpoint import (
    CheckpointError,
    check_writable,
    find_checkpoint,
    publish,
    verify_checkpoint,
)
from egspo.config import GenerationConfig, TrainConfig
from egspo.denoiser import Denoiser
from egspo.generation import save_generation_config
from egspo.recipe import save_config
from egspo.sft import SupervisedData, train_supervised
from egspo.state import save_weights

logger = logging.getLogger("egspo")

# Changes when the procedure does, so that cached warm starts of an older one are not used.
_PROCEDURE = 1


def cache_folder() -> Path:
    """``EGSPO_CACHE``, or ``egspo`` under the user's cache folder."""
    if "EGSPO_CACHE" in os.environ:
        return Path(os.environ["EGSPO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "egspo"


def warm_start(config: TrainConfig, data: Data, device: torch.device) -> Path:
    """Folder of the warm-started model: from the cache, or trained now and put there."""
    assert config.sft is not None
    cached = cache_folder() / "warm_start" / _content_key(config, data)
    try:
        verify_checkpoint(cached)
        logger.info("warm start found in %s", cached)
    except CheckpointError:
        check_writable(cached.parent, 0)
        model = fresh_model(config.model, data.tokenizer, config.sft.seed, device)
        denoiser = plain_denoiser(config, model, data.tokenizer)
        _train(config, data, denoiser, Path(config.output_dir) / "warm_start")
        publish(cached, lambda folder: save_model(model, data.tokenizer, config.generation, folder))
    return cached / "model"


def run_sft(config: TrainConfig, *, resume: Path | None = None) -> Path:
    """Supervised training by ``config.sft``; returns the folder of the trained model.

    Checkpoints go to ``output_dir/checkpoints`` every ``checkpoint.every`` steps.

    Args:
        config: with an ``sft`` section.
        resume: a checkpoint, or a run whose newest one to continue from.
    """
    if config.sft is None:
        raise ValueError("the recipe has no sft section")
    output = Path(config.output_dir)
    check_writable(output, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = build_data(config)
    if config.model.path is None:
        base = fresh_model(config.model, data.tokenizer, config.sft.seed, device)
    else:
        base = base_model(config.model, config.model.path, device)
    check_data(config, data, getattr(base.config, "max_sequence_length", None))
    save_config(config, output / "config.yaml")
    model = trainable_model(config.model, base, config.sft.seed)
    denoiser = plain_denoiser(config, model, data.tokenizer)
    _train(config, data, denoiser, output, resume=resume, every=config.checkpoint.every)
    final = output / "final"
    publish(final, lambda folder: save_model(model, data.tokenizer, config.generation, folder))
    return final


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, folder: Path
) -> None:
    """Weights, tokenizer and decoding settings, loadable by ``egspo generate``."""
    saved = save_weights(model, folder)
    tokenizer.save_pretrained(saved)
    save_generation_config(generation, saved)


def _train(
    config: TrainConfig,
    data: Data,
    denoiser: Denoiser,
    folder: Path,
    *,
    resume: Path | None = None,
    every: int = 0,
) -> None:
    assert config.sft is not None
    supervised = SupervisedData.encode(
        data.tokenizer, data.task.train, config.generation.max_new_tokens, denoiser
    )
    train_supervised(
        denoiser,
        supervised,
        config.sft,
        folder,
        write_model=lambda path: save_model(
            denoiser.model, data.tokenizer, config.generation, path
        ),
        resume=None if resume is None else find_checkpoint(resume),
        checkpoint_every=every,
        keep_last=config.checkpoint.keep_last,
    )


def _content_key(config: TrainConfig, data: Data) -> str:
    """Digest of all that decides the weights."""
    assert config.sft is not None
    content = {
        "procedure": _PROCEDURE,
        "model": config.model.config,
        "dtype": config.model.dtype,
        "sft": asdict(config.sft),
        "length": config.generation.max_new_tokens,
        "vocabulary": data.tokenizer.get_vocab(),
        "prompts": data.train.token_ids,
        "targets": [example.target for example in data.task.train],
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
