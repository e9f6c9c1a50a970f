"""A model small enough to enumerate: one free logit per (canvas, position, token), in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from egspo.config import GenerationConfig
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import PromptBatch, Trajectory, length_before
from egspo.rollouts.unmasking import schedule

VOCAB = 4
MASK = VOCAB - 1
PROMPT = (0,)


class TabularModel(nn.Module):
    """Hidden states are the logits: the head is the identity."""

    def __init__(self, length: int, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(VOCAB**length, length, VOCAB, generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(scale * table)
        self.head = nn.Linear(VOCAB, VOCAB, bias=False, dtype=torch.float64)
        nn.init.eye_(self.head.weight).requires_grad_(False)
        self.length = length
        self.config = SimpleNamespace()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def logits(self, canvas: Tensor) -> Tensor:
        """[M, L, V] of canvases int64 [M, L]."""
        place = VOCAB ** torch.arange(self.length)
        return self.table[(canvas * place).sum(1)]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, compute_logits: bool
    ) -> SimpleNamespace:
        prompt = input_ids.shape[1] - self.length
        hidden = self.logits(input_ids[:, prompt:])
        return SimpleNamespace(last_hidden_state=nn.functional.pad(hidden, (0, 0, prompt, 0)))


def toy_denoiser(length: int, seed: int = 0, scale: float = 1.0) -> Denoiser:
    return Denoiser(TabularModel(length, seed, scale), mask_id=MASK, eos_id=2, pad_id=0)


def reward(tokens: Tensor) -> Tensor:
    """An arbitrary fixed reward of completions [..., L], float64."""
    place = 3.0 ** torch.arange(tokens.shape[-1], dtype=torch.float64)
    return torch.sin((tokens * place).sum(-1) * 1.7) + (tokens == 1).double().mean(-1)


def with_policy(config: GenerationConfig, policy: str, *, bound: float = 1e-9) -> GenerationConfig:
    """``config`` with another order; ``bound`` is of the entropy, where it has one: by default so
    small that every step reveals its quota."""
    threshold = bound if policy == "entropy_bounded" else config.threshold
    return replace(config, policy=policy, threshold=threshold)  # type: ignore[arg-type]


@dataclass
class Enumeration:
    """Every trajectory of a policy with its probability (differentiable in the table)."""

    trajectory: Trajectory
    probability: Tensor


def enumerate_trajectories(
    denoiser: Denoiser,
    config: GenerationConfig,
    logits_of: Callable[[list[int], int], Tensor] | None = None,
    prompt: tuple[int, ...] = PROMPT,
    causal: bool = False,
) -> Enumeration:
    """All trajectories of an unmasking policy, by its definition and not by the rollout.

    Args:
        denoiser: only its special tokens, where ``logits_of`` is given.
        config: of the generation, early exit apart; a threshold with the policies max_prob and
            entropy_bounded only.
        logits_of: (canvas, first position of the active block) -> [L, V]; by default those of the
            tabular model.
        prompt: of all.
        causal: whether blocks are counted from the first token of the prompt.
    """
    length, steps, width = config.max_new_tokens, config.steps, config.block_length
    plan = schedule(width, steps * width // length, width)
    plans = {width: plan}
    for count in range(1, width):
        plans[count] = schedule(count, -(-count * len(plan) // width), count)
    leaves: list[tuple[list[int], list[int], Tensor, list[float]]] = []

    def extend(
        canvas: list[int],
        when: list[int],
        place: tuple[int, int],
        step: int,
        probability: Tensor,
        entropies: list[float],
    ) -> None:
        start, within = place
        inside = range(max(start, 0), min(start + width, length))
        if all(canvas[i] != MASK for i in inside):
            start, within = start + width, 0
            inside = range(max(start, 0), min(start + width, length))
        if start >= length:
            leaves.append((canvas, when, probability, entropies))
            return
        if logits_of is None:
            logits = denoiser.model.logits(torch.tensor([canvas]))[0]  # type: ignore[operator]
        else:
            logits = logits_of(canvas, start)
        logits = logits.index_fill(1, torch.tensor([MASK]), -math.inf)
        probs = (logits / config.temperature).softmax(1)
        plain = logits.softmax(1)
        entropy = -torch.where(plain > 0, plain * plain.clamp(min=1e-300).log(), 0.0).sum(1)
        masked = [i for i in inside if canvas[i] == MASK]
        quota = plans[len(inside)][within].quota
        if config.threshold is not None:
            if config.policy == "entropy_bounded":
                losses = sorted(float(entropy[i].detach()) for i in masked)
                sure = sum(total < config.threshold for total in itertools.accumulate(losses))
            else:
                sure = sum(float(plain[i].max()) >= config.threshold for i in masked)
            most = config.max_tokens_per_step or width
            quota = min(max(quota, min(sure, most)), len(masked))
        for tokens, chosen, weight in outcomes(config.policy, probs, plain, entropy, masked, quota):
            new_canvas, new_when = list(canvas), list(when)
            for position, token in zip(chosen, tokens, strict=True):
                new_canvas[position], new_when[position] = token, step
            mean = float(torch.stack([entropy[i] for i in chosen]).mean().detach())
            extend(
                new_canvas,
                new_when,
                (start, within + 1),
                step + 1,
                probability * weight,
                [*entropies, mean],
            )

    begin = torch.ones((), dtype=torch.float64)
    first = -(len(prompt) % width) if causal else 0
    extend([MASK] * length, [-1] * length, (first, 0), 0, begin, [])
    taken = [len(leaf[3]) for leaf in leaves]
    steps = max(steps, *taken)
    tokens = torch.tensor([leaf[0] for leaf in leaves])
    trajectory = Trajectory(
        prompts=PromptBatch.from_lists([prompt] * len(leaves), 0),
        tokens=tokens,
        unmask_step=torch.tensor([leaf[1] for leaf in leaves], dtype=torch.int16),
        entropy=torch.tensor(
            [leaf[3] + [math.nan] * (steps - len(leaf[3])) for leaf in leaves], dtype=torch.float64
        ),
        confidence=torch.zeros(tokens.shape),
        token_entropy=torch.zeros(tokens.shape),
        log_prob=torch.zeros(len(leaves), steps, dtype=torch.float64),
        steps=torch.tensor(taken),
        lengths=length_before(tokens, denoiser.eos_id),
        mask_id=MASK,
    )
    return Enumeration(trajectory, torch.stack([leaf[2] for leaf in leaves]))


def outcomes(
    policy: str, probs: Tensor, plain: Tensor, entropy: Tensor, masked: list[int], quota: int
) -> list[tuple[list[int], list[int], Tensor]]:
    """(tokens, positions, probability) of every way a step can go."""
    if policy == "low_confidence":
        results = []
        for draw in itertools.product(range(MASK), repeat=len(masked)):
            weight = torch.stack([probs[i, t] for i, t in zip(masked, draw, strict=True)]).prod()
            order = sorted(
                range(len(masked)), key=lambda j: (-plain[masked[j], draw[j]].item(), masked[j])
            )[:quota]
            results.append(([draw[j] for j in order], [masked[j] for j in order], weight))
        return results
    top = plain.detach().sort(dim=1, descending=True).values
    score: dict[str, Callable[[int], float]] = {
        "max_prob": lambda i: float(top[i, 0]),
        "margin": lambda i: float(top[i, 0] - top[i, 1]),
        "entropy": lambda i: -float(entropy[i].detach()),
        "entropy_bounded": lambda i: -float(entropy[i].detach()),
        "left_to_right": lambda i: 0.0,
    }
    if policy == "random":
        subsets = [list(subset) for subset in itertools.combinations(masked, quota)]
    else:
        subsets = [sorted(masked, key=lambda i: (-score[policy](i), i))[:quota]]
    return [
        (
            list(draw),
            subset,
            torch.stack([probs[i, t] for i, t in zip(subset, draw, strict=True)]).prod()
            / len(subsets),
        )
        for subset in subsets
        for draw in itertools.product(range(MASK), repeat=quota)
    ]
