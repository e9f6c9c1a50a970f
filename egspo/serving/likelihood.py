"""Likelihoods of given completions: a Monte-Carlo estimate of the masked-diffusion bound.

For a completion x of L tokens after a prompt q,

    log p(x | q) >= E_k E_M [ L / k * sum_{i in M} log softmax(logits_i)[x_i] ],

with k uniform in 1..L and M a uniform set of k masked positions, whose logits are of the canvas
that shows all others (LLaDA, arXiv 2502.09992, equation 6). For L = 1 it is no bound but the exact
log-probability. With a block-causal model it is the sum of that over the blocks, each behind the
tokens of the blocks before it and with nothing behind it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import PromptBatch
from egspo_kernels import TokenStats, linear_token_stats

Request = tuple[Sequence[int], Sequence[int]]
"""Tokens of a prompt and of a completion."""


@dataclass(frozen=True)
class _State:
    """A canvas of one request."""

    request: int
    tokens: list[int]
    """Prompt and canvas."""
    masked: list[int]
    """Places of the masks in ``tokens``, ascending."""
    size: int
    """Tokens of the completion, or of the block of it, that the masks are of."""


@torch.no_grad()
def likelihood_bounds(
    denoiser: Denoiser,
    requests: Sequence[Request],
    *,
    samples: int,
    seed: int,
    batch_size: int,
    on_done: Callable[[int], None] | None = None,
) -> list[float]:
    """Estimates of the lower bound on ``log p(completion | prompt)``, in nats.

    Unbiased estimates of the bound, not of the likelihood: the bound is looser for some completions
    than for others. The numbers k are spread evenly over 1..L (systematic sampling). Noise is a
    function of the seed and the request: an estimate does not depend on the other requests.

    Args:
        denoiser: the model.
        requests: neither part may be empty.
        samples: canvases per request; of a completion of one token, which needs no more, one.
        seed: of the masks.
        batch_size: canvases in a forward pass.
        on_done: called with how many requests are complete since the last call.

    Raises:
        ValueError: a part of a request is empty, or ``samples`` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    _check(requests)
    # Canvases of similar length share a batch.
    order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
    bounds = [0.0] * len(requests)
    waiting: list[_State] = []
    for place, number in enumerate(order):
        waiting += _states(denoiser, requests, number, samples, seed)
        last = place + 1 == len(order)
        while len(waiting) >= batch_size or (last and waiting):
            batch, waiting = waiting[:batch_size], waiting[batch_size:]
            for state, value in zip(batch, _log_probs(denoiser, requests, batch), strict=True):
                count = 1 if state.size == 1 else samples
                bounds[state.request] += state.size / len(state.masked) * value / count
        if on_done is not None:
            on_done(1)
    return bounds


@torch.no_grad()
def greedily_decoded(
    denoiser: Denoiser, requests: Sequence[Request], *, batch_size: int
) -> list[bool]:
    """Whether greedy decoding of a canvas of that length gives the completion.

    Token by token, each time where the most likely token is the most probable, in one block or
    in those of a block-causal model: what a rollout does at temperature 0 with ``steps =
    max_new_tokens`` and the policy ``max_prob``. A request is given up at its first wrong token,
    mostly after one pass.
    """
    _check(requests)
    order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
    greedy = [False] * len(requests)
    for first in range(0, len(order), batch_size):
        running = [
            _masked(denoiser, requests, number, next(_spans(denoiser, *requests[number])))
            for number in order[first : first + batch_size]
        ]
        while running:
            following = []
            for state, row in zip(running, _best(denoiser, requests, running), strict=True):
                place, token = row
                prompt, completion = requests[state.request]
                if token != completion[place - len(prompt)]:
                    continue
                left = [i - len(prompt) for i in state.masked if i != place]
                if not left:  # of the block: the next one's
                    done = len(state.tokens) - len(prompt)
                    spans = _spans(denoiser, prompt, completion)
                    left = next((list(span) for span in spans if span.start >= done), [])
                if left:
                    following.append(_masked(denoiser, requests, state.request, left))
                else:
                    greedy[state.request] = True
            running = following
    return greedy


def _check(requests: Sequence[Request]) -> None:
    for number, (prompt, completion) in enumerate(requests):
        if not prompt or not completion:
            part = "completion" if prompt else "prompt"
            raise ValueError(f"the {part} of request {number} has no tokens")


def _states(
    denoiser: Denoiser, requests: Sequence[Request], number: int, samples: int, seed: int
) -> list[_State]:
    """The canvases of a request."""
    prompt, completion = requests[number]
    key = hashlib.blake2b(f"{seed} {list(prompt)} {list(completion)}".encode(), digest_size=8)
    generator = torch.Generator().manual_seed(int.from_bytes(key.digest(), "big") >> 1)
    states = []
    for span in _spans(denoiser, prompt, completion):
        length = len(span)
        if length == 1:
            states.append(_masked(denoiser, requests, number, span))
            continue
        offset = float(torch.rand((), generator=generator, dtype=torch.float64))
        for sample in range(samples):
            masked = 1 + int(length * (((offset + sample) / samples) % 1.0))
            places = torch.randperm(length, generator=generator)[:masked] + span.start
            states.append(_masked(denoiser, requests, number, sorted(places.tolist())))
    return states


def _spans(denoiser: Denoiser, prompt: Sequence[int], completion: Sequence[int]) -> Iterator[range]:
    """The completion, or the blocks of it with a block-causal model."""
    size = denoiser.block_size or len(prompt) + len(completion)
    first = 0 if denoiser.block_size is None else -(len(prompt) % size)
    for start in range(first, len(completion), size):
        yield range(max(start, 0), min(start + size, len(completion)))


def _masked(
    denoiser: Denoiser, requests: Sequence[Request], number: int, places: Sequence[int]
) -> _State:
    """The canvas of a request with masks at ``places`` of the completion, ascending, all of one
    block: where there are later ones, they are left out."""
    prompt, completion = requests[number]
    span = next(s for s in _spans(denoiser, prompt, completion) if places[0] in s)
    tokens = [*prompt, *completion[: span.stop]]
    masked = [len(prompt) + place for place in places]
    for place in masked:
        tokens[place] = denoiser.mask_id
    return _State(number, tokens, masked, len(span))


def _log_probs(
    denoiser: Denoiser, requests: Sequence[Request], states: Sequence[_State]
) -> list[float]:
    """Of each state, the summed log-probability of the tokens behind its masks."""
    targets = []
    for state in states:
        prompt, completion = requests[state.request]
        targets += [completion[place - len(prompt)] for place in state.masked]
    stats, owner = _stats(denoiser, states, targets)
    assert stats.log_prob is not None
    totals = stats.log_prob.new_zeros(len(states), dtype=torch.float64)
    values: list[float] = totals.index_add(0, owner, stats.log_prob.double()).tolist()
    return values


def _best(
    denoiser: Denoiser, requests: Sequence[Request], states: Sequence[_State]
) -> list[tuple[int, int]]:
    """Of each state, the place and the token that greedy decoding reveals next."""
    stats, _ = _stats(denoiser, states, None)
    confidence, argmax = stats.confidence.tolist(), stats.argmax.tolist()
    best, first = [], 0
    for state in states:
        rows = range(first, first + len(state.masked))
        row = max(rows, key=lambda r: confidence[r])  # of equal ones the first, as in a rollout
        best.append((state.masked[row - first], int(argmax[row])))
        first += len(state.masked)
    return best


def _stats(
    denoiser: Denoiser, states: Sequence[_State], targets: list[int] | None
) -> tuple[TokenStats, Tensor]:
    """Statistics at all masks, state by state, and int64 [N] which state each is of."""
    device = denoiser.device
    batch = PromptBatch.from_lists([s.tokens for s in states], denoiser.pad_id, device)
    width = batch.ids.shape[1]
    owner = torch.tensor([n for n, s in enumerate(states) for _ in s.masked], device=device)
    columns = [width - len(s.tokens) + place for s in states for place in s.masked]
    with denoiser.autocast():
        hidden = denoiser.hidden_states(batch.ids, None if bool(batch.mask.all()) else batch.mask)
        stats = linear_token_stats(
            hidden[owner, torch.tensor(columns, device=device)],
            denoiser.head_weight,
            None if targets is None else torch.tensor(targets, device=device),
            bias=denoiser.head_bias,
            banned_token=denoiser.mask_id,
        )
    denoiser.work.head_rows += len(columns)
    return stats, owner
