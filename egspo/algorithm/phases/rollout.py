"""Phase 1, prompts -> trajectories: completions that have ended are scored meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from egspo.algorithm.batch import Groups, Metrics
from egspo.config import TrainConfig
from egspo.engines.reduction import part
from egspo.rewards.queue import RewardQueue
from egspo.rewards.training import TrainingRewards
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout_blocks
from egspo.rollouts.trajectory import NEVER, PromptBatch, Trajectory
from egspo.tasks.prompts import Data


@dataclass(frozen=True)
class Rollout:
    """Denoises this process's share of a step's sequences."""

    config: TrainConfig
    data: Data
    denoiser: Denoiser
    rewards: TrainingRewards
    complete: bool
    """Whether the most likely tokens of every step are recorded."""

    def __call__(self, groups: Groups, queue: RewardQueue) -> Trajectory:
        """The B trajectories of ``groups.sequences``; what has ended goes into the ``queue``."""
        algorithm, generation = self.config.algorithm, self.config.generation
        prompts = groups.prompts()
        token_ids = [self.data.train.token_ids[i] for i in prompts]
        for block in rollout_blocks(
            self.denoiser,
            PromptBatch.from_lists(token_ids, self.denoiser.pad_id, self.denoiser.device),
            generation,
            seed=self.config.seed,
            sequence_ids=groups.ids(groups.sequences).to(self.denoiser.device),
            entropy_over=algorithm.entropy_over,
            entropy_reduce=algorithm.entropy_reduce,
            entropy_temperature=1.0 if algorithm.entropy_at == "one" else generation.temperature,
            complete=self.complete,
            pool=algorithm.predicts,
            experts=algorithm.objective == "stepwise",
        ):
            if block.finished:
                texts = self.rewards.decode(block.ended.tokens)
                queue.add(block.finished, texts, [prompts[i] for i in block.finished])
        return block.trajectory


def rollout_metrics(trajectory: Trajectory, seconds: float) -> Metrics:
    """What is logged of B trajectories that took so many seconds."""
    tokens = int((trajectory.unmask_step != NEVER).sum())
    return {
        "entropy/mean": part(trajectory.entropy),
        "length/mean": part(trajectory.lengths),
        "rollout/saved": part(1 - trajectory.steps / trajectory.num_steps),
        "speed/tokens_per_second": tokens / max(seconds, 1e-9),
    }
