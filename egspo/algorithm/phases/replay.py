"""Phase 4, selected steps -> scored states; rewards of one-step completions are found meanwhile."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from egspo.algorithm.batch import Samples, Selection
from egspo.algorithm.objectives.base import Objective
from egspo.algorithm.replay import Scores
from egspo.rewards.queue import RewardQueue
from egspo.rewards.training import TrainingRewards


def replay_states(
    objective: Objective, samples: Samples, selection: Selection, rewards: TrainingRewards
) -> tuple[Scores, RewardQueue | None]:
    """What the ``objective`` needs to know of its states before any update.

    The rewards of a micro-batch's one-step completions are found while the next is replayed, and
    after: the queue has them later. None where the objective completes nothing.
    """
    if not objective.completes:
        return objective.score(selection.states), None
    prompts = samples.groups.prompts(selection.sequence_of_states())
    with ExitStack() as failure:
        queue = RewardQueue(rewards.score, rewards.intermediate, samples.known)
        failure.enter_context(queue)

        def add(index: Tensor, completions: Tensor) -> None:
            places = index.tolist()
            queue.add(places, rewards.decode(completions), [prompts[i] for i in places])

        scores = objective.score(selection.states, on_completions=add)
        failure.pop_all()  # there was none: the queue goes on until the update needs it
    return scores, queue
