"""The expectation of a run's own gradient: every group of every trajectory, through ``Iteration``.

The rollout is the real one. Only what it samples is replaced: each position gets the token of the
completion whose turn it is, with the probability that the model gives that token. Orders such as
``max_prob`` depend on the logits alone, so that a completion has one trajectory, and its
probability is known from :mod:`tests.helpers.toy`. Of other orders it is said what each step draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo.algorithm.iteration import Iteration
from egspo.algorithm.pipeline import Pipeline
from egspo.algorithm.value_head import ValueHead
from egspo.config import TrainConfig
from egspo.engines import WholeModel
from egspo.engines.optimization import build_optimizer
from egspo.engines.processes import Processes
from egspo.engines.reduction import merge
from egspo.rollouts.denoiser import Denoiser
from egspo.tasks import Example, Reward, Task
from egspo.tasks.prompts import Data, PromptSet
from egspo_kernels import sample_tokens
from tests.helpers.toy import MASK, PROMPT

EOS = 2
Draws = Sequence[int] | Sequence[Sequence[int]]


def text_of(tokens: Sequence[int]) -> str:
    """What is before the first EOS."""
    return "".join(map(str, itertools.takewhile(lambda token: token != EOS, tokens)))


def data_of(reward: Callable[[str], float], prompt: Sequence[int] = PROMPT) -> Data:
    """One ``prompt``; tokens 0 and 1 are text, 2 ends it."""

    def score(completions: Sequence[str], **_: Any) -> list[float]:
        return [reward(text) for text in completions]

    def decode(rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return ["".join(map(str, row)) for row in rows]

    tokenizer: Any = SimpleNamespace(chat_template=None, batch_decode=decode)
    examples = [Example([{"role": "user", "content": "0"}], {}, None)]
    prompts = PromptSet(examples, [list(prompt)])
    task = Task("enumerated", examples, examples, [Reward("score", score)])
    return Data(task, tokenizer, prompts, prompts)


@dataclass
class Outcome:
    """Of the update on one group."""

    gradient: Tensor
    """Of everything that is trained, summed over the optimizer steps."""
    metrics: dict[str, Any]


class EnumeratedRun:
    """A run whose rollouts are given, and whose weights hardly move.

    Args:
        config: of the run; its learning rate is replaced by one that changes nothing.
        denoiser: in float64.
        data: one prompt.
        processes: this one among all of them.
    """

    def __init__(
        self,
        config: TrainConfig,
        denoiser: Denoiser,
        data: Data,
        processes: Processes | None = None,
    ) -> None:
        config.optimizer.learning_rate = 1e-30
        self.config, self.denoiser = config, denoiser
        self.processes = processes or Processes(alone=True)
        model = denoiser.model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.engine = WholeModel(
            model, lambda model: build_optimizer(model, config.optimizer), self.processes
        )
        self.values = ValueHead.of(config.algorithm, denoiser, self.processes)
        self.iteration = Iteration(config, data, denoiser, self.engine, self.processes, self.values)
        self.gradient = self._zero()

    def groups(
        self, wanted: Sequence[Sequence[Draws]], monkeypatch: pytest.MonkeyPatch
    ) -> list[Outcome]:
        """A step for each group of completions, each of L tokens, or of the L that each of T steps
        draws."""
        size = self.config.algorithm.group_size
        tokens = torch.tensor(wanted)
        assert tokens.shape[1] == size and self.config.steps > len(wanted)
        if tokens.ndim == 3:
            tokens = tokens[:, :, None].expand(-1, -1, self.config.generation.steps, -1)
        # A pipeline makes one step more.
        tokens = torch.cat([tokens, tokens[:1]])
        self._force(tokens.movedim(2, 0).flatten(1), monkeypatch)
        reduce, outcomes = self.engine.reduce_gradients, []

        def keep(has_gradient: bool) -> bool:
            averaged = reduce(has_gradient)
            if averaged:
                gradients = [
                    torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained
                ]
                self.gradient += torch.cat([gradient.flatten() for gradient in gradients])
            return averaged

        monkeypatch.setattr(self.engine, "reduce_gradients", keep)
        before = [p.detach().clone() for p in self.trained]
        work = lambda step: ([0], (step - 1) * size)  # noqa: E731
        with closing(Pipeline(self.config, self.iteration, work)) as pipeline:
            for step in range(1, len(wanted) + 1):
                self.gradient = self._zero()
                metrics = merge(self.processes.gather(pipeline.step(step)))
                outcomes.append(Outcome(self.gradient, metrics))
        assert all(map(torch.equal, before, self.trained))
        return outcomes

    def _zero(self) -> Tensor:
        return torch.zeros(sum(p.numel() for p in self.trained), dtype=torch.float64)

    def _force(self, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        """At ``step``, position ``row_id`` of all completions becomes ``tokens[step, row_id]``."""

        def forced(
            logits: Tensor, *, row_ids: Tensor, temperature: float, step: int, **options: Any
        ) -> Any:
            options = {"row_ids": row_ids, "temperature": temperature, "step": step, **options}
            sample = sample_tokens(logits, **options)
            token = tokens[step, row_ids]
            allowed = logits.index_fill(1, torch.tensor([MASK]), float("-inf"))
            place = token[:, None]
            return sample._replace(
                token=token,
                log_prob=(allowed / temperature).log_softmax(1).gather(1, place)[:, 0],
                confidence=allowed.softmax(1).gather(1, place)[:, 0],
            )

        monkeypatch.setattr("egspo.rollouts.block.sample_tokens", forced)


def expectation(outcomes: Sequence[Outcome], probability: Sequence[Tensor]) -> Tensor:
    """Of the gradient over all groups, each with the probability of its trajectories."""
    total = torch.zeros_like(outcomes[0].gradient)
    for outcome, weight in zip(outcomes, probability, strict=True):
        total += weight * outcome.gradient
    return total
