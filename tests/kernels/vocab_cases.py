"""Problems whose head is cut over the vocabulary: on one rank, and as each rank of several."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import torch
from torch import Tensor

from egspo_kernels import (
    Surrogate,
    TokenStats,
    aggregate_steps,
    linear_stepwise_surrogate,
    linear_token_stats,
    vocab_parallel_stepwise_surrogate,
    vocab_parallel_token_stats,
)
from egspo_kernels.vocab_parallel.exchange import Shard
from tests.kernels.ranks import shared_ranks
from tests.kernels.surrogate_cases import assert_same_bits

LOW, HIGH, BETA = 0.2, 0.3, 0.1


@dataclasses.dataclass
class Case:
    """A head, its shards (first row and size of each rank), and rows in three steps."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor | None
    ref_hidden: Tensor
    ref_weight: Tensor
    shards: list[tuple[int, int]]
    options: dict[str, Any]
    """Of both functions."""

    @classmethod
    def make(
        cls,
        sizes: list[int],
        rows: int = 7,
        dim: int = 5,
        dtype: torch.dtype = torch.float64,
        scale: float = 1.0,
        **options: Any,
    ) -> Case:
        vocab = sum(sizes)
        generator = torch.Generator().manual_seed(rows * 131 + vocab)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden, weight, bias = scale * normal(rows, dim), normal(vocab, dim), normal(vocab)
        ref_hidden, ref_weight = hidden + 0.2 * normal(rows, dim), weight + 0.1 * normal(vocab, dim)
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        targets = torch.randint(vocab, (rows,), generator=generator)
        tensors = (t.to(dtype) for t in (hidden, weight, bias))
        references = (t.to(dtype) for t in (ref_hidden, ref_weight))
        shards = list(zip(starts, sizes, strict=True))
        return cls(*tensors, targets, *references, shards, options)

    def to(self, dtype: torch.dtype) -> Case:
        names = ("hidden", "weight", "bias", "ref_hidden", "ref_weight")
        return dataclasses.replace(self, **{n: getattr(self, n).to(dtype) for n in names})

    def held(self, rank: int | None) -> slice:
        """Tokens of the shard of ``rank``; all of them on one rank."""
        if rank is None:
            return slice(None)
        start, size = self.shards[rank]
        return slice(start, start + size)

    def operands(self, rank: int | None) -> list[Tensor]:
        """Leaves: hidden, and what is held of weight and bias."""
        held = self.held(rank)
        tensors = (self.hidden, self.weight[held], self.bias[held])
        return [tensor.detach().clone().requires_grad_() for tensor in tensors]

    def step_arguments(self, aggregation: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Steps with ratios on both sides of both clips, the last without a token.

        In float32, and the same for a case in another dtype.
        """
        step_ids = torch.arange(self.hidden.shape[0]) % 3
        double = self.to(torch.float64)
        options = {k: v for k, v in self.options.items() if k not in ("workspace_bytes", "backend")}
        log_prob = linear_token_stats(
            double.hidden,
            double.weight,
            self.targets,
            bias=double.bias,
            backend="reference",
            **options,
        ).log_prob
        assert log_prob is not None
        old = aggregate_steps(log_prob, step_ids, 4, aggregation)
        offsets = torch.tensor([0.5, -0.5, 0.05, 0.1])
        return step_ids, (old + offsets).float(), torch.tensor([-1.0, 2.0, 0.7, 1.0])


def statistics(
    rank: int | None, case: Case, **changes: Any
) -> tuple[TokenStats, tuple[Tensor, ...]]:
    """Statistics, and gradients of a mixture of them; on one rank, or as ``rank`` of several."""
    hidden, weight, bias = operands = case.operands(rank)
    function: Any = linear_token_stats if rank is None else vocab_parallel_token_stats
    place = {} if rank is None else {"vocab_start": case.shards[rank][0]}
    options = {"backend": "reference", **place, **case.options, **changes}
    stats = function(hidden, weight, case.targets, bias=bias, **options)
    places = torch.arange(1, len(stats.entropy) + 1)
    loss = (stats.entropy * places).sum() + (stats.logsumexp[:2] / 3).sum()
    if stats.log_prob is not None:
        log_prob = stats.log_prob.masked_fill(stats.log_prob.isinf(), 0.0)
        loss = loss - 2 * (log_prob * places.flip(0)).sum()
    return _detached(stats), torch.autograd.grad(loss, operands)


def surrogate(
    rank: int | None, case: Case, kl: str | None, aggregation: str, **changes: Any
) -> tuple[Surrogate, tuple[Tensor, ...]]:
    """The surrogate and the gradients of its loss; without a KL the bias is trained too."""
    hidden, weight, bias = operands = case.operands(rank)
    function: Any = linear_stepwise_surrogate if rank is None else vocab_parallel_stepwise_surrogate
    step_ids, old_log_prob, advantage = case.step_arguments(aggregation)
    if kl:
        changes |= {"kl": kl, "beta": changes.pop("beta", BETA), "ref_hidden": case.ref_hidden}
        changes |= {"ref_weight": case.ref_weight[case.held(rank)]}
        operands, bias = operands[:2], bias.detach()
    place = {} if rank is None else {"vocab_start": case.shards[rank][0]}
    options = {"backend": "reference", **place, **case.options, **changes}
    result = function(
        hidden,
        weight,
        case.targets,
        step_ids,
        old_log_prob,
        advantage,
        bias=bias,
        clip_low=LOW,
        clip_high=HIGH,
        aggregation=aggregation,
        **options,
    )
    return _detached(result), torch.autograd.grad(result.loss, operands)


def _detached(result: Any) -> Any:
    return type(result)(*(None if t is None else t.detach() for t in result))


def on_ranks(
    case: Case, function: Any, *arguments: Any, backend: str = "gloo", **changes: Any
) -> tuple[Any, tuple[Tensor, ...]]:
    """The result, checked to be of the same bits on all ranks, and the gradients put together."""
    case = dataclasses.replace(case, options=case.options | changes)
    world_size = len(case.shards)
    ranks = shared_ranks(world_size, backend)
    run = (function, case) if backend == "gloo" else (on_gpu, function, case)
    answers = ranks.call(*run, *arguments)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    (result, (grad_hidden, *_)), *others = answers
    for other, (same_gradient, *_) in others:
        assert_same_bits(grad_hidden, same_gradient)
        for mine, theirs in zip(result, other, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert_same_bits(mine, theirs)
    in_order = sorted(range(world_size), key=lambda rank: case.shards[rank])
    parts = [answers[rank][1][1:] for rank in in_order]
    return result, (grad_hidden, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def on_gpu(rank: int | None, function: Any, case: Case, *arguments: Any) -> Any:
    """``function`` with the tensors of the case on the GPU of the rank; its answer on the CPU."""
    device = torch.device("cuda", rank or 0)
    names = (field.name for field in dataclasses.fields(case))
    tensors = {name: getattr(case, name) for name in names}
    moved = {name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)}
    with device:
        result, gradients = function(rank, dataclasses.replace(case, **moved), *arguments)
    return (
        type(result)(*(None if t is None else t.cpu() for t in result)),
        tuple(gradient.cpu() for gradient in gradients),
    )


def compiled(rank: int, case: Case) -> tuple[TokenStats, tuple[Tensor, ...]]:
    """:func:`statistics` called from a compiled function."""

    def function(hidden: Tensor, weight: Tensor) -> TokenStats:
        start = case.shards[rank][0]
        return vocab_parallel_token_stats(2 * hidden, weight, case.targets, vocab_start=start)

    hidden, weight, _ = case.operands(rank)
    stats = torch.compile(function, backend="eager")(hidden, weight)
    gradients = torch.autograd.grad(stats.entropy.sum(), (hidden, weight))
    return _detached(stats), gradients


def summed(rank: int, values: list[Tensor]) -> Tensor:
    return Shard("summed", None, rank, 1, len(values)).sum_over_ranks(values[rank], "test")


# What a rank does wrong in the tests of failures.


def differing(rank: int, case: Case, who: int, changes: dict[str, Any]) -> Any:
    """Rank ``who`` has other fields or options than the rest."""
    if rank == who:
        fields = {field.name for field in dataclasses.fields(case)}
        own = {k: v for k, v in changes.items() if k in fields}
        others = {k: v for k, v in changes.items() if k not in fields}
        case = dataclasses.replace(case, **own, options=case.options | others)
    return statistics(rank, case)


def partly_trained(rank: int, case: Case) -> Any:
    hidden = case.hidden.clone().requires_grad_(rank == 0)
    start = case.shards[rank][0]
    weight = case.weight[case.held(rank)]
    return vocab_parallel_token_stats(hidden, weight, case.targets, vocab_start=start)


def other_function(rank: int, case: Case) -> Any:
    return statistics(rank, case) if rank else surrogate(rank, case, None, "sum")


def absent(rank: int, case: Case, who: int, seconds: float) -> Any:
    """Rank ``who`` is elsewhere, for longer than the others wait."""
    if rank == who:
        return time.sleep(seconds)
    return statistics(rank, case)


def dying_between_the_passes(rank: int, case: Case, who: int) -> Any:
    hidden = case.hidden.clone().requires_grad_()
    start, weight = case.shards[rank][0], case.weight[case.held(rank)]
    stats = vocab_parallel_token_stats(hidden, weight, case.targets, vocab_start=start)
    if rank == who:
        os._exit(1)
    return torch.autograd.grad(stats.entropy.sum(), hidden)
