"""``egspo sft``, and the warm start of a new model: supervised once, then cached by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from egspo.config import CheckpointConfig, GenerationConfig, TrainConfig
from egspo.config.recipe import save_config
from egspo.engines.processes import Processes
from egspo.files import CheckpointError, remove_partial
from egspo.rollouts.denoiser import Denoiser
from egspo.runs.checkpoint import check_writable
from egspo.runs.lock import RunLock
from egspo.runs.published import publish, verify_published
from egspo.serving.named_model import save_generation_config
from egspo.tasks import Example
from egspo.tasks.prompts import Data, build_data, supervised_examples
from egspo.training.build import (
    autocast_dtype,
    base_model,
    check_data,
    check_lora,
    fresh_model,
    plain_denoiser,
    trainable_model,
)
from egspo.training.continuation import Resume, chosen_checkpoint
from egspo.training.data_identity import check_same_data, data_identity, save_data_identity
from egspo.training.occupation import occupy
from egspo.training.sft import SupervisedData, train_supervised
from egspo.training.state import WEIGHTS, save_weights, trained_bytes

logger = logging.getLogger("egspo")

BASE = "base"
"""Folder of a run, for the model that its adapter or its KL goes with; see :func:`kept_base`."""

# Seconds after which nobody is writing any more to what is half-written in the cache.
_ABANDONED = 24 * 3600.0
# Changes when the procedure does, so that cached warm starts of an older one are not used.
_PROCEDURE = 3


def cache_folder() -> Path:
    """``EGSPO_CACHE``, or ``egspo`` under the user's cache folder."""
    if "EGSPO_CACHE" in os.environ:
        return Path(os.environ["EGSPO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "egspo"


def warm_start(
    config: TrainConfig, data: Data, device: torch.device, *, only_cached: bool = False
) -> Path:
    """Folder of the warm-started model: from the cache, or trained now and put there.

    It is trained in float32, whatever ``model.dtype`` says of its use.

    Args:
        config, data, device: of the run.
        only_cached: another process has trained it.

    Raises:
        OSError: the cache cannot be written, has no room, or is not the other process's.
    """
    assert config.sft is not None
    examples = supervised_examples(config, data)
    cached = cache_folder() / "warm_start" / _content_key(config, data, examples, device)
    if only_cached and not cached.is_dir():
        raise FileNotFoundError(
            f"process 0 made the warm start, and {cached} is not there: put EGSPO_CACHE on a file "
            "system that all machines share"
        )
    if not _is_complete(cached):
        model_config = replace(config.model, dtype="float32")
        model = fresh_model(model_config, data.tokenizer, config.sft.seed, device)
        check_data(config, data, model.config)
        check_lora(config.model, model)
        needed = sum(p.numel() * p.element_size() for p in model.parameters())
        check_writable(cached.parent, needed, name="the warm-start cache (EGSPO_CACHE)")
        denoiser = plain_denoiser(config, model, data.tokenizer, device)
        _train(config, data, examples, denoiser, Path(config.output_dir) / "warm_start")
        remove_partial(cached.parent, older_than=_ABANDONED)
        # Another run may have been faster, and be reading its own, or be just about to.
        publish(
            cached,
            lambda folder: save_model(model, data.tokenizer, config.generation, folder),
            replace=False,
        )
    return cached / "model"


def needs_base(config: TrainConfig) -> bool:
    """Whether the model that training starts from is needed later and nothing else keeps it."""
    needed = config.model.has_adapter or config.algorithm.beta > 0
    return config.model.path is None and needed


def kept_base(
    output: Path, resumed: Path | None, write: Callable[[Path], object], *, main: bool = True
) -> Path:
    """The folder of the model that the run in ``output`` starts from.

    It is in the run itself, as a cache may be deleted any time.

    Args:
        output: folder of the run.
        resumed: the run that is resumed, whose base is taken where it has one.
        write: puts the model into a folder, as :func:`save_model` does.
        main: whether this process writes; the others come later and find the folder.

    Raises:
        CheckpointError: the base of ``resumed`` is damaged.
    """
    target = output / BASE
    earlier = None if resumed is None else resumed / BASE
    if main and earlier is not None and earlier.is_dir():
        verify_published(earlier)
        if earlier.resolve() != target.resolve():
            publish(target, lambda path: shutil.copytree(earlier / WEIGHTS, path / WEIGHTS))
    elif main:
        publish(target, write)
    return target / WEIGHTS


def _is_complete(cached: Path) -> bool:
    try:
        verify_published(cached)
    except CheckpointError as error:
        if cached.exists():
            logger.warning("the cached warm start is made anew: %s", error)
        return False
    logger.info("warm start found in %s", cached)
    return True


def run_sft(config: TrainConfig, *, resume: Resume = None) -> Path:
    """Supervised training by ``config.sft``; returns the folder of the trained model.

    ``config.output_dir`` gets ``config.yaml``, ``sft_metrics.jsonl``, ``checkpoints/`` (every
    ``checkpoint.every`` steps) and ``final/``. On an error or interrupt the state is saved first.

    Args:
        config: with an ``sft`` section.
        resume: as :func:`egspo.training.trainer.train`.

    Raises:
        CheckpointError: ``resume`` is damaged, or not of a run with this configuration.
        NonFiniteError: on a NaN or infinite loss or gradient, before the weights take it.
        NotOursError: ``output_dir`` has something else where the run would write.
        OSError: ``output_dir`` cannot be written, or its disk is too full.
        RunLockedError: another run goes on in ``output_dir``, or the folder is gone.
        ValueError: there is no ``sft`` section, more than one process, or a bad input.
    """
    if config.sft is None:
        raise ValueError("the recipe has no sft section")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("egspo sft trains on one process: start it without accelerate or torchrun")
    output = Path(config.output_dir)
    lock = occupy(output, Processes(alone=True))
    assert lock is not None
    with lock:
        return _run_sft(config, output, chosen_checkpoint(config, resume, "sft"), lock)


def _run_sft(config: TrainConfig, output: Path, checkpoint: Path | None, lock: RunLock) -> Path:
    """In a folder that is this run's; goes on from ``checkpoint``."""
    assert config.sft is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = build_data(config)
    examples = supervised_examples(config, data)
    identity = data_identity(data.task, examples)
    if checkpoint is not None:
        check_same_data(config, identity, checkpoint.parent.parent)
    if config.model.path is None:
        base = fresh_model(config.model, data.tokenizer, config.sft.seed, device)
        if config.model.has_adapter:
            resumed = None if checkpoint is None else checkpoint.parent.parent
            folder = kept_base(
                output,
                resumed,
                lambda path: save_model(base, data.tokenizer, config.generation, path),
            )
            base = base_model(config.model, str(folder), device)
    else:
        base = base_model(config.model, config.model.path, device)
    check_data(config, data, base.config)
    model = trainable_model(config.model, base, config.sft.seed)
    denoiser = plain_denoiser(config, model, data.tokenizer, device)
    check_writable(output, trained_bytes(model, config.checkpoint.keep_last + 2))
    save_config(config, output / "config.yaml")
    save_data_identity(output, identity)
    _train(
        config,
        data,
        examples,
        denoiser,
        output,
        resume=checkpoint,
        checkpoint=config.checkpoint,
        check=lock.check,
    )
    final = output / "final"
    publish(final, lambda folder: save_model(model, data.tokenizer, config.generation, folder))
    return final


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Weights, tokenizer and decoding settings, loadable by ``egspo generate``.

    ``weights`` as :func:`egspo.training.state.save_weights`.
    """
    saved = save_weights(model, folder, weights)
    tokenizer.save_pretrained(saved)
    save_generation_config(generation, saved)


def _train(
    config: TrainConfig,
    data: Data,
    examples: Sequence[Example],
    denoiser: Denoiser,
    folder: Path,
    *,
    resume: Path | None = None,
    checkpoint: CheckpointConfig | None = None,
    check: Callable[[], object] = lambda: None,
) -> None:
    assert config.sft is not None
    supervised = SupervisedData.encode(
        data.tokenizer, examples, config.generation.max_new_tokens, denoiser
    )
    train_supervised(
        denoiser,
        supervised,
        config.sft,
        folder,
        write_model=lambda path, weights: save_model(
            denoiser.model, data.tokenizer, config.generation, path, weights
        ),
        resume=resume,
        checkpoint=checkpoint,
        check=check,
    )


def _content_key(
    config: TrainConfig, data: Data, examples: Sequence[Example], device: torch.device
) -> str:
    """Digest of all that decides the weights, but for versions and hardware."""
    assert config.sft is not None
    content = {
        "procedure": _PROCEDURE,
        "model": config.model.config,
        "attn_implementation": config.model.attn_implementation,
        "autocast": autocast_dtype(config, device),
        "sft": {**asdict(config.sft), "log_every": None, "task_options": None},
        "length": config.generation.max_new_tokens,
        "vocabulary": data.tokenizer.get_vocab(),
        "special_tokens": data.tokenizer.special_tokens_map,
        "chat_template": data.tokenizer.chat_template,
        "examples": [(example.prompt, example.target) for example in examples],
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
