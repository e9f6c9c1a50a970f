"""Which checkpoint of a run to evaluate."""

from __future__ import annotations

import logging
from pathlib import Path

from egspo.files import CheckpointError
from egspo.runs.checkpoint import CHECKPOINTS, list_checkpoints, step_of
from egspo.runs.metrics import read_metrics
from egspo.runs.published import verify_published
from egspo.training.best import HELD_OUT

logger = logging.getLogger("egspo")


def choose_checkpoint(run: Path, which: str) -> Path:
    """The verified checkpoint of the run at ``run``.

    Args:
        run: ``output_dir`` of the run.
        which: ``best``, ``last``, or a step.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        FileNotFoundError: there is no run.
        ValueError: ``which`` is none of these.
    """
    kept = list_checkpoints(run / CHECKPOINTS)
    if not kept:
        raise CheckpointError(
            f"{run / CHECKPOINTS} has no checkpoint to choose: is {run} the output_dir of a run?"
        )
    if which == "best":
        chosen = best_checkpoint(run)
    elif which == "last":
        chosen = kept[-1]
    elif which.isdecimal():
        by_step = {step_of(path): path for path in kept}
        if int(which) not in by_step:
            raise CheckpointError(
                f"{run} keeps no checkpoint of step {which}, but {sorted(by_step)}"
            )
        chosen = by_step[int(which)]
    else:
        raise ValueError(f"a checkpoint is best, last or a step, got {which!r}")
    verify_published(chosen)
    return chosen


def best_checkpoint(run: Path) -> Path:
    """The checkpoint that the run keeps with the greatest held-out reward; of equal ones the first.

    Training measures it (``eval/reward`` in ``metrics.jsonl``) on the task's validation split where
    it has one: the test split takes no part in the choice. That a better step was not kept is
    logged.

    Raises:
        CheckpointError: the run keeps no checkpoint of a step at which it evaluated.
        FileNotFoundError: there are no metrics.
    """
    rewards = {
        record["step"]: record[HELD_OUT]
        for record in read_metrics(run)
        if record.get(HELD_OUT) is not None
    }
    kept = {step_of(path): path for path in list_checkpoints(run / CHECKPOINTS)}
    candidates = [step for step in sorted(kept) if step in rewards]
    if not candidates:
        raise CheckpointError(
            f"{run} keeps checkpoints of the steps {sorted(kept)} and evaluated at "
            f"{sorted(rewards)}: the best cannot be told. Train with checkpoint.keep_best"
        )
    best = max(candidates, key=lambda step: rewards[step])
    logger.info(
        "step %d has the best held-out reward, %.4f, of the checkpoints kept (steps %s)",
        *(best, rewards[best], ", ".join(map(str, candidates))),
    )
    top = max(sorted(rewards), key=lambda step: rewards[step])
    if rewards[top] > rewards[best]:
        logger.warning(
            "step %d was better (%.4f): %s",
            *(top, rewards[top]),
            "so training helped none of them"
            if top == 0
            else "its checkpoint was not kept (checkpoint.keep_best)",
        )
    return kept[best]
