"""Whether a run may be continued with a given configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from egspo.config import TrainConfig
from egspo.config.recipe import TASK_COPY, config_to_dict, load_config, task_content
from egspo.files import CheckpointError
from egspo.runs.checkpoint import (
    CHECKPOINTS,
    check_unclaimed,
    find_checkpoint,
    has_checkpoints,
    newest_intact,
)

# What may differ without changing what the steps already made would have been.
_FREE = (
    "output_dir",
    "steps",
    "eval",
    "checkpoint",
    "distributed",  # the same gradient, summed in another order
    "trackers",
    "model.activation_offload",
    "generation.cuda_graphs",
    "task.file",  # its content is compared instead
    "task.reward_timeout",
    "micro_batch_size",  # how the same gradient is summed
    "micro_batch_tokens",
    "algorithm.share_prompts",
    "max_empty_steps",
    "allow_changed_data",
)
_FREE_SFT = (
    *_FREE,
    "seed",
    "algorithm",
    "optimizer",
    "prompts_per_step",
    "generation.steps",
    "generation.block_length",
    "generation.temperature",
    "generation.policy",
    "generation.batch_size",
    "generation.cache",
    "generation.guidance",
    "generation.threshold",
    "generation.max_tokens_per_step",
    "generation.early_exit",
    "task.reward_weights",
    "task.on_reward_error",
    "task.intermediate_rewards",
    "sft.steps",
    "sft.log_every",
)


Resume = Path | Literal["auto"] | None
"""A checkpoint, or a run whose newest one to go on from; :data:`AUTO`; None begins."""
AUTO: Literal["auto"] = "auto"
"""From the newest intact checkpoint in the output folder, or from the beginning without any."""


def chosen_checkpoint(
    config: TrainConfig, resume: Resume, command: Literal["train", "sft"]
) -> Path | None:
    """The checkpoint that a run with ``config`` goes on from; None where it begins.

    Raises:
        CheckpointError: there is none, it is damaged or of another configuration; or the output
            folder has checkpoints of another run.
    """
    folder = Path(config.output_dir) / CHECKPOINTS
    if resume is None:
        checkpoint = None
    elif isinstance(resume, Path):
        checkpoint = find_checkpoint(resume)
    else:
        checkpoint = newest_intact(folder.parent)
        if checkpoint is None and has_checkpoints(folder):
            raise CheckpointError(
                f"all checkpoints in {folder} are damaged: --overwrite starts over, and keeps the "
                "old folder under another name"
            )
    check_unclaimed(folder, checkpoint)
    if checkpoint is not None:
        check_continuation(config, checkpoint.parent.parent, command)
    return checkpoint


def check_continuation(config: TrainConfig, run: Path, command: Literal["train", "sft"]) -> None:
    """Compare ``config`` with the one saved by ``run``, which ``command`` started.

    Raises:
        CheckpointError: naming every option that differs and may not.
    """
    saved_file = run / "config.yaml"
    if not saved_file.is_file():
        raise CheckpointError(f"{run} has no config.yaml: it is not a run of egspo")
    saved, new = (flat(config_to_dict(c)) for c in (load_config(saved_file), config))
    free = {"train": _FREE, "sft": _FREE_SFT}[command]
    changed = [
        f"{name} was {saved.get(name)!r}, now {new.get(name)!r}"
        for name in sorted({*saved, *new})
        if saved.get(name) != new.get(name) and not _is_under(name, free)
    ]
    steps, schedule = {
        "train": ("steps", "optimizer.schedule"),
        "sft": ("sft.steps", "sft.optimizer.schedule"),
    }[command]
    if new[steps] != saved[steps] and new[schedule] != "constant":
        changed.append(
            f"{steps} was {saved[steps]}, now {new[steps]}, which {schedule}={new[schedule]} "
            "depends on"
        )
    content, copied = task_content(config, run)
    if content != copied:
        changed.append(f"task.file={config.task.file} differs from the copy {run / TASK_COPY}")
    if changed:
        raise CheckpointError(
            f"the configuration differs from the one {run} was started with: " + "; ".join(changed)
        )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one, by dotted names."""
    result: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            result.update(flat(value, f"{prefix}{name}."))
        else:
            result[f"{prefix}{name}"] = value
    return result


def _is_under(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)
