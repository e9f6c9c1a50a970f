"""What objectives share that mask completions again, instead of going back to denoising steps.

A *canvas* is a completion of the rollout with some of its tokens masked again, in front of its
prompt, which may have masked tokens too. Every optimizer step of ``algorithm.num_iterations`` has
masks of its own, a function of (seed, step, sequence) alone; probabilities before the update are
those under the same masks, so that the first ratio is 1. A completion ends with its first EOS: what
is behind it is masked in every canvas and never scored.

Log-probabilities are those of the policy, which gives the mask token none, at
``algorithm.ratio_temperature``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from egspo.algorithm.advantages import egspo_advantages, groups_with_spread
from egspo.algorithm.batch import Batch, OneStepCompletions, Samples, Selection
from egspo.algorithm.micro_batches import MicroBatches
from egspo.algorithm.objectives.base import OnCompletions
from egspo.algorithm.replay import Scorer, Scores
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, TrainConfig
from egspo.engines.processes import Processes
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import NEVER, PromptBatch, Trajectory
from egspo_kernels import Surrogate, counter_uniform

# Keeps the noise of the masks apart from the rollout's.
_STREAM = 0x72656D61736B
_DRAWS = 1 << 16
_LARGEST_LOG_RATIO = 20.0


class Masks(NamedTuple):
    """C canvases of each of B completions."""

    prompt: Tensor
    """bool [B, C, P], prompt tokens that are masked."""
    hidden: Tensor
    """bool [B, C, L], completion tokens that are masked."""
    scored: Tensor
    """bool [B, C, L], those of them whose log-probabilities count."""
    weight: Tensor
    """float64 [B, C], of these log-probabilities in the estimate of the objective."""


@dataclass(frozen=True)
class Canvases(States):
    """M canvases: states whose step 0 is what is scored. Those of a completion and an optimizer
    step (the rank) stand one after the other."""

    weight: Tensor
    """float64 [M], :attr:`Masks.weight`."""
    tokens: Tensor
    """bool [M, L], tokens of the completion, its first EOS included."""
    mean_tokens: float
    """Of a completion, over those of all processes, skipped ones included."""


class Bundle(NamedTuple):
    """N completions of a micro-batch with C canvases each, in float64."""

    log_prob: Tensor
    """[N, C, L] of every scored token; 0 elsewhere. Differentiable."""
    old: Tensor
    """The same before the update."""
    reference: Tensor | None
    """The same under the reference policy."""
    scored: Tensor
    """bool [N, C, L]."""
    weight: Tensor
    """[N, C]."""
    tokens: Tensor
    """bool [N, L]."""
    advantage: Tensor
    """[N]."""
    mean_tokens: float
    """Of a completion of the training step."""

    def estimate(self, log_prob: Tensor) -> Tensor:
        """[N, L]: what stands for the log-probability of every token, of [N, C, L]."""
        return (log_prob * self.weight[:, :, None]).sum(1)


class Outcome(NamedTuple):
    """Of a bundle; everything but the loss is there to be logged."""

    loss: Tensor
    """Scalar, a sum over the completions."""
    ratio: Tensor
    """Probability ratios, NaN where there are none."""
    kl: Tensor
    advantage: Tensor
    """Of the ratios."""
    clamped: Tensor


class RemaskedObjective(ABC):
    """An :class:`~egspo.algorithm.objectives.base.Objective` but for the masks and the loss.

    Not of block-causal models, whose rollout sees clean blocks only.

    Args:
        config: of the run.
        denoiser: of the policy.
        micro_batches: how many canvases share a pass.
        processes: this one among all of them.
        prompt_tokens: of a prompt, on average.
    """

    completes = False
    completes_in_rollout = False
    epochs = 1  # the masks of every optimizer step are ranks of their own
    has_ratios = True
    """Whether the loss needs probabilities before the update."""
    share = 1.0

    def __init__(
        self,
        config: TrainConfig,
        denoiser: Denoiser,
        micro_batches: MicroBatches,
        processes: Processes,
        prompt_tokens: float,
    ) -> None:
        self.config, self.micro_batches, self.processes = config, micro_batches, processes
        self.scorer = Scorer(denoiser, config.algorithm, config.generation)

    @property
    @abstractmethod
    def canvases(self) -> int:
        """C, of a completion and an optimizer step."""

    @abstractmethod
    def masks(self, prompts: Tensor, tokens: Tensor, ids: Tensor, update: int) -> Masks:
        """Those of optimizer step ``update``.

        Args:
            prompts: bool [B, P], False at padding.
            tokens: bool [B, L], tokens of the completions.
            ids: int64 [B], of the sequences.
            update: from 0.
        """

    @abstractmethod
    def outcome(self, bundle: Bundle) -> Outcome:
        """The loss of a bundle, before it is divided by the number of completions."""

    def select(self, samples: Samples) -> Selection:
        groups, rewards = samples.groups, samples.rewards
        equal = ~groups_with_spread(rewards)
        teaches = ~equal | (self.config.algorithm.beta > 0)
        scored = ~rewards.flatten().isnan()
        every = samples.trajectory
        tokens = completion_tokens(every.tokens, self.scorer.denoiser.eos_id)
        total = sum(self.processes.gather(int(tokens.sum())))
        sequences = [s for s in groups.sequences if teaches[s // groups.size] and scored[s]]
        rows = torch.tensor(sequences, dtype=torch.int64) - groups.sequences.start
        rows = rows.to(tokens.device)
        states = self._states(
            every.take(rows),
            tokens[rows],
            groups.ids(sequences).to(tokens.device),
            total / rewards.numel(),
        )
        per_update = [s for s in sequences for _ in range(self.canvases)]
        return Selection(
            states,
            per_update * self.config.algorithm.num_iterations,
            int(equal.sum()),
            skipped_groups=int((~teaches).sum()),
            of_rollout=False,
        )

    def _states(
        self, trajectory: Trajectory, tokens: Tensor, ids: Tensor, mean_tokens: float
    ) -> Canvases:
        updates = self.config.algorithm.num_iterations
        prompts = trajectory.prompts
        drawn = [self.masks(prompts.mask, tokens, ids, update) for update in range(updates)]
        prompt, hidden, scored, weight = (
            torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*drawn, strict=True)
        )
        row = torch.arange(len(ids), device=ids.device).repeat_interleave(self.canvases)
        row = row.repeat(updates)
        count = len(row)
        shown = torch.full_like(trajectory.unmask_step[row], -1)
        masked = trajectory.take(row)
        remasked = replace(
            masked,
            prompts=PromptBatch(
                masked.prompts.ids.masked_fill(prompt, self.scorer.denoiser.mask_id),
                masked.prompts.mask,
            ),
            unmask_step=shown.masked_fill(hidden, NEVER).masked_fill(scored, 0),
            entropy=trajectory.entropy.new_full((count, 1), float("nan")),
            log_prob=trajectory.log_prob.new_zeros((count, 1)),
            steps=torch.ones_like(row),
        )
        rank = torch.arange(updates, device=ids.device).repeat_interleave(count // updates)
        return Canvases(
            trajectory=remasked,
            row=torch.arange(count, device=ids.device),
            rank=rank,
            step=torch.zeros_like(row),
            ranks=updates,
            weight=weight,
            tokens=tokens[row],
            mean_tokens=mean_tokens,
        )

    @torch.no_grad()
    def score(
        self,
        states: States,
        *,
        on_completions: OnCompletions = lambda index, completions: None,
    ) -> Scores:
        shape, device = states.trajectory.tokens.shape, states.row.device
        empty = torch.zeros(shape, dtype=torch.float64, device=device)
        old = empty if self.has_ratios and self.config.replays else None
        reference = empty.clone() if self.config.algorithm.beta > 0 else None
        recorded = torch.full_like(empty[:, 0], float("nan"))

        def work(index: Tensor) -> None:
            if old is not None:
                old[index] = self.scorer.token_log_probs(states, index).double()
                recorded[index] = old[index].sum(1)
            if reference is not None:
                with self.scorer.denoiser.reference():
                    reference[index] = self.scorer.token_log_probs(states, index).double()

        groups = self.micro_batches.plan(states, ranks=states.ranks)
        if old is not None or reference is not None:
            groups = self.micro_batches.each(states, groups, work)
        return Scores(old, recorded, reference, None, None, groups)

    def advantages(self, batch: Batch, one_step: OneStepCompletions | None) -> Tensor:
        rewards = batch.samples.rewards
        advantage = self.completion_advantages(rewards)
        return advantage.flatten()[batch.selection.sequence_of_states()]

    def completion_advantages(self, rewards: Tensor) -> Tensor:
        """float64 [P, G] of rewards [P, G]: ``R_i - mean_j R_j``."""
        valid = torch.ones_like(rewards, dtype=torch.bool)[..., None]
        scale = self.config.algorithm.scale_by_std
        return egspo_advantages(rewards, valid, scale_by_std=scale)[..., 0]

    def counts(self, advantage: Tensor) -> Tensor:
        return (advantage != 0) | (self.config.algorithm.beta > 0)

    def loss(
        self, states: States, index: Tensor, scores: Scores, advantage: Tensor, weight: float
    ) -> Surrogate:
        assert isinstance(states, Canvases)
        new = self.scorer.token_log_probs(states, index).double()
        old = new.detach() if scores.old_log_prob is None else scores.old_log_prob[index]
        reference = None if scores.ref_log_prob is None else scores.ref_log_prob[index]

        def bundled(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1, self.canvases, *tensor.shape[1:])

        outcome = self.outcome(
            Bundle(
                log_prob=bundled(new),
                old=bundled(old),
                reference=None if reference is None else bundled(reference),
                scored=bundled(states.trajectory.unmask_step[states.row[index]] == 0),
                weight=bundled(states.weight[index]),
                tokens=states.tokens[index][:: self.canvases],
                advantage=advantage[index][:: self.canvases],
                mean_tokens=states.mean_tokens,
            )
        )
        algorithm, ratio = self.config.algorithm, outcome.ratio.detach()
        return Surrogate(
            loss=outcome.loss * weight,
            log_prob=new.detach().sum(1),
            ratio=ratio,
            kl=outcome.kl.detach(),
            clipped_low=(ratio < 1 - algorithm.clip_low) & (outcome.advantage < 0),
            clipped_high=(ratio > 1 + algorithm.clip_high) & (outcome.advantage > 0),
            clamped=outcome.clamped,
        )

    def nothing(self, trajectory: Trajectory) -> Tensor:
        zero = torch.zeros(1, dtype=torch.int64, device=trajectory.tokens.device)
        states = States(trajectory, zero, zero, zero, 1)
        return self.scorer.token_log_probs(states, zero).sum() * 0.0

    def uniform(self, ids: Tensor, update: int, draw: int, width: int) -> Tensor:
        """[B, width] in [0, 1), a function of (seed, update, draw, id) and the column."""
        seed = self.config.seed ^ _STREAM
        return counter_uniform(seed, update * _DRAWS + draw, ids, width)

    def prompt_masks(self, prompts: Tensor, ids: Tensor, update: int, draw: int) -> Tensor:
        """bool [B, P]: each token with the probability ``algorithm.prompt_masking``, padding never.

        Columns count from the completion, so that the padding of a batch changes nothing.
        """
        noise = self.uniform(ids, update, draw, prompts.shape[1]).flip(1)
        return (noise < self.config.algorithm.prompt_masking) & prompts


def one_canvas(prompt: Tensor, tokens: Tensor) -> Masks:
    """The whole completion masked: bool [B, P] prompt masks, bool [B, L] tokens."""
    scored = tokens[:, None]
    weight = torch.ones_like(scored[..., 0], dtype=torch.float64)
    return Masks(prompt[:, None], torch.ones_like(scored), scored, weight)


def completion_tokens(tokens: Tensor, eos_id: int) -> Tensor:
    """bool [B, L]: tokens up to and including the first EOS."""
    is_eos = (tokens == eos_id).int()
    return is_eos.cumsum(1) - is_eos == 0


def smallest(noise: Tensor, allowed: Tensor, count: Tensor) -> Tensor:
    """bool [B, L]: the ``count`` int64 [B] positions of least noise among those ``allowed``; the
    first of equal ones."""
    order = noise.masked_fill(~allowed, 2.0).argsort(dim=1, stable=True)
    places = order.argsort(dim=1)
    return (places < count[:, None]) & allowed


def log_ratio(new: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """``new - other`` in the range in which ``exp`` is safe, and how many were beyond it."""
    difference = new - other
    clamped = difference.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return clamped, (difference != clamped).sum()


def clipped_gain(ratio: Tensor, advantage: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """PPO's ``min(r A, clip(r) A)``."""
    clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    return torch.minimum(ratio * advantage, clipped * advantage)


def token_outcome(bundle: Bundle, algorithm: AlgorithmConfig) -> Outcome:
    """GRPO on tokens: clipped ratios of every token's estimate, and the KL estimate k3.

    The sum over tokens is divided by the mean number of tokens, so that the mean over completions
    is the mean over all tokens of the training step.
    """
    estimate = bundle.estimate(bundle.log_prob)[bundle.tokens]
    old = bundle.estimate(bundle.old)[bundle.tokens]
    advantage = bundle.advantage[:, None].expand(bundle.tokens.shape)[bundle.tokens]
    difference, clamped = log_ratio(estimate, old)
    ratio = difference.exp()
    loss, kl = -clipped_gain(ratio, advantage, algorithm), torch.zeros_like(ratio)
    if bundle.reference is not None:
        other = bundle.estimate(bundle.reference)[bundle.tokens]
        apart, beyond = log_ratio(other, estimate)
        kl, clamped = apart.exp() - apart - 1, clamped + beyond
        loss = loss + algorithm.beta * kl
    return Outcome(loss.sum() / bundle.mean_tokens, ratio, kl, advantage, clamped)


def ratio_free(loss: Tensor) -> Outcome:
    """Of a loss without ratios and KL."""
    none = torch.full_like(loss[None], float("nan"))
    return Outcome(loss, none, none, none, torch.zeros_like(loss, dtype=torch.int64))
