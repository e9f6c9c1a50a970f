"""CUDA graphs of the Triton calls: captured once, replayed on other numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from egspo_kernels import (
    linear_stepwise_surrogate,
    linear_token_stats,
    sample_tokens,
    stepwise_surrogate,
    token_stats,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

ROWS, VOCAB, WIDTH = 12, 20001, 64


def _surrogate(logits: Tensor, ref_logits: Tensor, kl: str | None) -> list[Tensor]:
    steps = torch.arange(ROWS, device="cuda") % 3
    zeros = torch.zeros(3, device="cuda")
    leaf = logits.detach().requires_grad_()
    result = stepwise_surrogate(
        leaf,
        steps,
        steps,
        zeros - 30.0,
        zeros + 1.0,
        kl=kl,  # type: ignore[arg-type]
        beta=0.1 if kl else 0.0,
        ref_logits=ref_logits if kl else None,
        clip_low=0.2,
        clip_high=0.2,
        backend="triton",
    )
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    return [*result, gradient]


def _linear(logits: Tensor, ref_logits: Tensor, kl: str | None, *, steps: bool) -> list[Tensor]:
    hidden, weight = (
        logits[:, :WIDTH].contiguous(),
        ref_logits[:, : 4 * WIDTH].t() @ logits[:, :WIDTH],
    )
    leaf = hidden.detach().requires_grad_()
    targets = torch.arange(ROWS, device="cuda")
    if steps:
        zeros = torch.zeros(3, device="cuda")
        loss = linear_stepwise_surrogate(
            leaf,
            weight,
            targets,
            targets % 3,
            zeros - 10.0,
            zeros + 1.0,
            kl=kl,  # type: ignore[arg-type]
            beta=0.1 if kl else 0.0,
            ref_hidden=hidden + 0.1 if kl else None,
            clip_low=0.2,
            clip_high=0.2,
            backend="triton",
        ).loss
    else:
        loss = linear_token_stats(leaf, weight, targets, backend="triton").entropy.sum()
    return [loss, *torch.autograd.grad(loss, leaf)]


def _sample(logits: Tensor, temperature: float, entropy_temperature: float) -> list[Tensor]:
    ids = torch.arange(ROWS, device="cuda")
    return list(
        sample_tokens(
            logits,
            temperature=temperature,
            seed=3,
            step=5,
            row_ids=ids,
            banned_token=7,
            entropy_temperature=entropy_temperature,
            backend="triton",
        )
    )


CALLS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "token_stats": lambda x, y: list(
        token_stats(x, torch.arange(ROWS, device="cuda"), temperature=0.7, backend="triton")
    ),
    "token_stats, some rows": lambda x, y: list(
        token_stats(
            x.bfloat16(),
            torch.arange(3, device="cuda"),
            rows=torch.arange(3, device="cuda") * 4,
            backend="triton",
        )
    ),
    "sample, temperature 1": lambda x, y: _sample(x, 1.0, 1.0),
    "sample, two temperatures": lambda x, y: _sample(x, 0.5, 0.7),
    "sample, greedy": lambda x, y: _sample(x, 0.0, 1.0),
    "surrogate": lambda x, y: _surrogate(x, y, None),
    "surrogate, k3": lambda x, y: _surrogate(x, y, "k3"),
    "surrogate, exact KL": lambda x, y: _surrogate(x, y, "exact"),
    "linear_token_stats": lambda x, y: _linear(x, y, None, steps=False),
    "linear_stepwise_surrogate": lambda x, y: _linear(x, y, None, steps=True),
    "linear_stepwise_surrogate, k3": lambda x, y: _linear(x, y, "k3", steps=True),
    "linear_stepwise_surrogate, exact KL": lambda x, y: _linear(x, y, "exact", steps=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_graphs_replay_every_call(name: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(ROWS, VOCAB, device="cuda", generator=generator) for _ in range(4)]
    logits, ref_logits = inputs[0].clone(), inputs[1].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the caches of libraries
        CALLS[name](logits, ref_logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = CALLS[name](logits, ref_logits)
    for x, y in (inputs[:2], inputs[2:]):
        logits.copy_(x)
        ref_logits.copy_(y)
        graph.replay()
        for output, expected in zip(outputs, CALLS[name](x, y), strict=True):
            assert torch.equal(output.nan_to_num(), expected.nan_to_num())
