"""Where one-step completions are cheaper: in the passes of the rollout, or in a replay."""

from __future__ import annotations

from typing import Literal

from egspo.algorithm.micro_batches import Columns
from egspo.config import TrainConfig
from egspo.rollouts.unmasking import schedule
from egspo.rollouts.work import ModelCost, Work


def cheaper_source(
    config: TrainConfig,
    cost: ModelCost | None,
    prompt_tokens: float,
    prediction_shift: int,
    *,
    causal: bool = False,
) -> Literal["rollout", "replay"]:
    """What ``algorithm.one_step`` means for a run: itself, or for ``auto`` what :func:`extra_work`
    counts fewer FLOPs of.

    Args:
        config: of the run.
        cost: of the model; of one that does not say its sizes a pass costs more than any rows.
        prompt_tokens: of a prompt, on average.
        prediction_shift: of the model.
        causal: a block-causal model's, whose steps do not compute later blocks: a replay.

    Raises:
        ValueError: the rollout is asked for, and cannot.
    """
    asked = config.algorithm.one_step
    if causal:
        if asked == "rollout":
            raise ValueError(
                "algorithm.one_step: rollout needs the hidden states of later blocks, which the "
                "steps of a block-causal model do not compute: use auto or replay"
            )
        return "replay"
    if asked != "auto":
        return asked
    rollout, replay = extra_work(config, round(prompt_tokens), prediction_shift)
    if cost is None:
        fewer = (rollout.tokens, rollout.head_rows) <= (replay.tokens, replay.head_rows)
    else:
        fewer = cost.forward(rollout) <= cost.forward(replay)
    return "rollout" if fewer else "replay"


def extra_work(config: TrainConfig, prompt_tokens: int, prediction_shift: int) -> tuple[Work, Work]:
    """What the one-step completions of a trajectory take on top of everything else: in the rollout,
    and in a replay.

    The rollout has the head at the masked positions of the active block anyway; later blocks come
    on top, at each step, or once a block where only the pass that makes its cache computes them. A
    replay takes passes over the selected states, unless it is made anyway, and the head at what is
    masked there, here the mean over all steps.
    """
    generation, ranks = config.generation, config.ranks
    length = generation.max_new_tokens
    plan = schedule(length, generation.steps, generation.block_length)
    rollout, replay = Work(), Work()
    if config.algorithm.entropy_over != "masked":
        once = generation.cache == "dual"
        begun = [step for step in plan if not once or step.masked == generation.block_length]
        rollout.head_rows = sum(length - step.end for step in begun)
    masked = sum(step.masked + length - step.end for step in plan)
    if config.replays:  # which has the head at the revealed positions anyway
        masked -= length
    else:
        for place in range(ranks):
            start = plan[place * len(plan) // ranks].start
            columns = Columns(generation, prediction_shift, [0], [prompt_tokens], [start])
            replay += columns.work([0])
    replay.head_rows = ranks * masked // len(plan)
    return rollout, replay
