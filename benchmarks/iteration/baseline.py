"""The same iteration as published research code does it: what egspo is measured against.

The mathematics, the noise and the order of steps are egspo's, and so are tokens, selected steps,
loss and gradient (``tests/benchmarks/test_iteration.py``). What differs is how:

* every forward pass has logits of the whole canvas, prompt included;
* the rollout keeps every canvas, and the probabilities of the revealed tokens over the whole
  vocabulary, from which step entropies are taken afterwards;
* states are passed one at a time, with a softmax over the whole canvas, by the reference policy
  and by the policy, and gradients of the states accumulate.

Nothing slows it down beyond that: sequences are denoised in the same batches, attention is the same
fused one, one-step completions are read off the logits of the rollout, old log-probabilities are
those of the update's own pass, nothing is read back from the device between steps or states, and
noise is drawn only where a token may be revealed (published code draws float64 noise over the
canvas). On a GPU that noise comes from plain tensor operations, where egspo's sampling kernel draws
its own.

Not in it, as published code has it otherwise or not at all: padding, early exit, block caches,
guidance, several inner epochs, exact KL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.meter import Meter
from egspo.config import TrainConfig
from egspo.models.tokenization import decode_completions
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.work import Work
from egspo.tasks.prompts import Data
from egspo_kernels.reference.sampling import draw


@dataclass
class Denoised:
    """B trajectories, step by step."""

    canvases: list[Tensor]
    """T tensors int64 [B, S], before each step; S is prompt and completion."""
    revealed: list[Tensor]
    """T tensors int64 [B, n], the columns that each step revealed."""
    probs: list[Tensor]
    """T tensors float32 [B, n, V], the probabilities that the revealed tokens had."""
    greedy: list[Tensor]
    """T tensors int64 [B, S], each canvas completed by the most likely tokens; none for EGSPO."""
    final: Tensor
    """int64 [B, S]."""


@dataclass
class Replayed:
    """What is known of the K selected states of B trajectories before the update."""

    ref_log_prob: Tensor
    """float32 [B, K]; zeros without a reference."""
    completions: Tensor
    """int64 [B, K, L]; empty for EGSPO."""


@dataclass
class BaselineOutcome:
    """What an iteration of the baseline did."""

    denoised: Denoised
    selected: Tensor
    """int64 [B, K]."""
    replayed: Replayed
    advantage: Tensor
    """float32 [B, K]."""
    loss: float


class Baseline:
    """One iteration, written from the algorithm alone.

    Args:
        config: of the iteration. Prompts must have one length.
        before_step: called when all gradients are there, before they are clipped.

    Raises:
        ValueError: ``config`` asks for what the baseline does not have.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        denoiser: Denoiser,
        optimizer: torch.optim.Optimizer,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        generation, algorithm = config.generation, config.algorithm
        for name, value, expected in (
            ("generation.policy", generation.policy, "max_prob"),
            ("generation.early_exit", generation.early_exit, False),
            ("generation.threshold", generation.threshold, None),
            ("generation.cache", generation.cache, "none"),
            ("generation.guidance", generation.guidance, 0.0),
            ("algorithm.strategy", algorithm.strategy, "high_entropy"),
            ("algorithm.entropy_over", algorithm.entropy_over, "revealed"),
            ("algorithm.stop_at_eos", algorithm.stop_at_eos, False),
            ("algorithm.aggregation", algorithm.aggregation, "exact"),
            # What the loss of a step is divided by, here and there.
            ("max_new_tokens % steps", generation.max_new_tokens % generation.steps, 0),
            ("algorithm.schedule", algorithm.schedule, "joint"),
            ("algorithm.num_iterations", algorithm.num_iterations, 1),
            ("algorithm.kl", algorithm.kl, "k3"),
        ):
            if value != expected:
                raise ValueError(f"the baseline needs {name}={expected!r}, got {value!r}")
        if len({len(ids) for ids in data.train.token_ids}) != 1:
            raise ValueError("the baseline needs prompts of one length")
        self.config, self.data, self.denoiser = config, data, denoiser
        self.optimizer, self.before_step = optimizer, before_step
        self.work = Work()
        """Forward passes so far."""

    def run(
        self, meter: Meter, follow: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> BaselineOutcome:
        """The iteration on all prompts.

        Args:
            meter: its phases are ``rollout``, ``select``, ``score`` and ``update``.
            follow: tokens int64 [B, L], unmask_step [B, L] and selected steps [B, K] to go on with
                from there: in bfloat16 the rounding of the matrix library may tip a token.
        """
        with meter.phase("rollout"):
            denoised = self.rollout()
        if follow is not None:
            redirect(denoised, *follow[:2])
            self._complete(denoised)
        with meter.phase("select"):
            selected = self.select(denoised)
        if follow is not None:
            selected = follow[2]
        with meter.phase("score"):
            replayed = self.replay(denoised, selected)
            advantage = self.advantages(denoised, replayed)
        with meter.phase("update"):
            loss = self.update(denoised, selected, replayed, advantage)
        return BaselineOutcome(denoised, selected, replayed, advantage, loss)

    @torch.no_grad()
    def rollout(self) -> Denoised:
        """Denoise ``group_size`` completions of every prompt."""
        repeats = self.config.algorithm.group_size
        prompts = torch.tensor(list(self.data.train.token_ids), device=self.denoiser.device)
        prompts = prompts.repeat_interleave(repeats, dim=0)
        ids = torch.arange(len(prompts), device=prompts.device)
        size = self.config.generation.batch_size
        batches = [
            self._denoise(*part) for part in zip(prompts.split(size), ids.split(size), strict=True)
        ]
        columns = [list(zip(*(getattr(b, n) for b in batches), strict=True)) for n in _BY_STEP]
        joined = [[torch.cat(parts) for parts in steps] for steps in columns]
        return Denoised(*joined, final=torch.cat([b.final for b in batches]))

    def _denoise(self, prompts: Tensor, sequence_ids: Tensor) -> Denoised:
        """The rollout of one batch of prompts int64 [B, P]."""
        config, mask_id = self.config.generation, self.denoiser.mask_id
        rows, offset = prompts.shape
        canvas = torch.nn.functional.pad(prompts, (0, config.max_new_tokens), value=mask_id)
        canvases, revealed, stored, greedy = [], [], [], []
        steps = config.steps * config.block_length // config.max_new_tokens
        quotas = [
            config.block_length // steps + (i < config.block_length % steps) for i in range(steps)
        ]
        for start in range(0, config.max_new_tokens, config.block_length):
            block = slice(offset + start, offset + start + config.block_length)
            for index, quota in enumerate(quotas):
                logits = self._logits(canvas)
                positions = torch.arange(start, start + config.block_length, device=canvas.device)
                row_ids = sequence_ids[:, None] * config.max_new_tokens + positions
                sampled = logits.argmax(2)
                tempered = (logits[:, block] / config.temperature).softmax(2).flatten(0, 1)
                noise = (self.config.seed, index, row_ids.flatten())
                sampled[:, block] = draw(tempered, *noise).view(rows, -1)
                probs = logits.softmax(2)
                score = torch.full(canvas.shape, float("-inf"), device=canvas.device)
                score[:, block] = probs[:, block].amax(2)
                score = score.masked_fill(canvas != mask_id, float("-inf"))
                chosen = score.sort(dim=1, descending=True, stable=True).indices[:, :quota]
                if self.config.algorithm.stepwise:
                    greedy.append(canvas.where(canvas != mask_id, logits.argmax(2)))
                canvases.append(canvas)
                revealed.append(chosen)
                index3 = chosen[:, :, None].expand(-1, -1, probs.shape[2])
                stored.append(probs.gather(1, index3))
                canvas = canvas.scatter(1, chosen, sampled.gather(1, chosen))
        return Denoised(canvases, revealed, stored, greedy, canvas)

    def select(self, denoised: Denoised) -> Tensor:
        """The K steps of highest entropy, int64 [B, K]."""
        entropies = []
        for probs in denoised.probs:
            terms = -probs * probs.clamp(min=1e-30).log()
            entropies.append(terms.sum(2).mean(1))
        order = torch.stack(entropies, dim=1).sort(dim=1, descending=True, stable=True).indices
        return order[:, : self.config.algorithm.selected_steps]

    @torch.no_grad()
    def replay(self, denoised: Denoised, selected: Tensor) -> Replayed:
        """Reference log-probabilities and greedy one-step completions, state by state."""
        algorithm = self.config.algorithm
        length = self.config.generation.max_new_tokens
        ref = torch.zeros(selected.shape, device=selected.device)
        completions = selected.new_empty((*selected.shape, length if algorithm.stepwise else 0))
        for row, steps in enumerate(selected.tolist()):
            for rank, step in enumerate(steps):
                canvas = denoised.canvases[step][row : row + 1]
                if algorithm.stepwise:
                    completions[row, rank] = denoised.greedy[step][row, -length:]
                if algorithm.beta > 0:
                    with self.denoiser.reference():
                        logits = self._logits(canvas)
                    ref[row, rank] = self._step_log_prob(logits, denoised, row, step)
        return Replayed(ref, completions)

    def advantages(self, denoised: Denoised, replayed: Replayed) -> Tensor:
        """float32 [B, K]: the return less its mean over the group at the same rank."""
        algorithm = self.config.algorithm
        length = self.config.generation.max_new_tokens
        returns = self._rewards(denoised.final[:, -length:])[:, None]
        if algorithm.stepwise:
            values = self._rewards(replayed.completions.flatten(0, 1))
            values = values.view(replayed.ref_log_prob.shape)
            returns = (returns + algorithm.lam * (returns - values)) / (1 + algorithm.lam)
        groups = returns.expand_as(replayed.ref_log_prob).unflatten(0, (-1, algorithm.group_size))
        return (groups - groups.mean(1, keepdim=True)).flatten(0, 1)

    def update(
        self, denoised: Denoised, selected: Tensor, replayed: Replayed, advantage: Tensor
    ) -> float:
        """One optimizer step; returns the loss, the mean over all states."""
        algorithm = self.config.algorithm
        total = torch.zeros((), device=selected.device)
        low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
        for row, steps in enumerate(selected.tolist()):
            for rank, step in enumerate(steps):
                logits = self._logits(denoised.canvases[step][row : row + 1])
                log_prob = self._step_log_prob(logits, denoised, row, step)
                ratio = (log_prob - log_prob.detach()).exp()
                gain = advantage[row, rank]
                loss = -torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
                if algorithm.beta > 0:
                    difference = replayed.ref_log_prob[row, rank] - log_prob
                    loss = loss + algorithm.beta * (difference.exp() - difference - 1)
                loss = loss / denoised.revealed[step].shape[1] / selected.numel()
                loss.backward()
                total += loss.detach()
        self.before_step()
        trained = [p for p in self.denoiser.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)

    @torch.no_grad()
    def _complete(self, denoised: Denoised) -> None:
        """One-step completions of other canvases than those of the rollout; not counted."""
        work, mask_id = self.work.copy(), self.denoiser.mask_id
        for step in range(len(denoised.greedy)):
            canvas = denoised.canvases[step]
            logits = self._logits(canvas)
            denoised.greedy[step] = canvas.where(canvas != mask_id, logits.argmax(2))
        self.work = work

    def _logits(self, canvas: Tensor) -> Tensor:
        """float32 [B, S, V] of the whole canvas, [MASK] left out."""
        rows, columns = canvas.shape
        self.work.add(rows, columns, columns)
        self.work.head_rows += rows * columns
        with self.denoiser.autocast():
            logits: Tensor = self.denoiser.model(input_ids=canvas).logits
        self.work.logits_bytes += logits.numel() * logits.element_size()
        banned = torch.arange(logits.shape[2], device=canvas.device) == self.denoiser.mask_id
        return logits.float().masked_fill(banned, float("-inf"))

    def _step_log_prob(self, logits: Tensor, denoised: Denoised, row: int, step: int) -> Tensor:
        """Summed over the tokens that the step revealed, at the sampling temperature."""
        log_probs = (logits / self.config.generation.temperature).log_softmax(2)
        columns = denoised.revealed[step][row]
        return log_probs[0, columns, denoised.final[row, columns]].sum()

    def _rewards(self, tokens: Tensor) -> Tensor:
        """Of completions int64 [N, L]: float32 [N]."""
        texts = decode_completions(self.data.tokenizer, tokens.tolist(), self.denoiser.eos_id)
        total = [0.0] * len(texts)
        for reward in self.data.task.rewards:
            values = reward.function(completions=texts)
            total = [t + reward.weight * v for t, v in zip(total, values, strict=True)]
        return torch.tensor(total, device=tokens.device)


_BY_STEP = ("canvases", "revealed", "probs", "greedy")


def redirect(denoised: Denoised, tokens: Tensor, unmask_step: Tensor) -> None:
    """Put other trajectories in the place of those sampled; what is stored keeps its size."""
    offset = denoised.final.shape[1] - tokens.shape[1]
    denoised.final = torch.cat([denoised.final[:, :offset], tokens], dim=1)
    mask = denoised.canvases[0][0, -1]  # before the first step everything is masked
    for step, columns in enumerate(denoised.revealed):
        hidden = torch.nn.functional.pad(unmask_step >= step, (offset, 0), value=False)
        denoised.canvases[step] = denoised.final.where(~hidden, mask)
        now = (unmask_step == step).int().argsort(dim=1, descending=True, stable=True)
        denoised.revealed[step] = now[:, : columns.shape[1]] + offset
