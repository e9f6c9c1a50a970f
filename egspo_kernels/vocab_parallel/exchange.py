"""A vocabulary cut into one shard per rank: agreement on what is computed, and sums in rank order.

Whatever crosses ranks is combined in the order of the ranks on each of them, so that all of them
hold the same bits; an all-reduce promises no order.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from egspo_kernels import reference
from egspo_kernels.checks.arguments import may_read_values


class Shard(NamedTuple):
    """The rows of the head that this rank holds, among all."""

    function: str
    """The public function that was called, for messages."""
    group: dist.ProcessGroup | None
    start: int
    """Token id of the first row."""
    size: int
    vocab_size: int
    """Over all ranks."""

    def local_token(self, token: int | None) -> int | None:
        """Row of the shard, or None for no token or one of another shard."""
        if token is None or not self.start <= token < self.start + self.size:
            return None
        return token - self.start

    def local_targets(self, targets: Tensor) -> Tensor:
        """int64 rows of the shard, -1 for targets of another one."""
        local = targets.long() - self.start
        return torch.where((local >= 0) & (local < self.size), local, -1)

    def gather(self, values: Tensor, phase: str) -> Tensor:
        """[R, ...]: ``values``, of one shape and dtype on all ranks, in the order of the ranks."""
        gathered = values.new_empty((dist.get_world_size(self.group), *values.shape))
        if values.numel():
            with _joined(self.function, phase):
                dist.all_gather(list(gathered.unbind(0)), values.contiguous(), group=self.group)
        return gathered

    def sum_over_ranks(self, values: Tensor, phase: str) -> Tensor:
        """The sum of ``values`` over ranks, taken in rank order and in the accumulation dtype.

        Each rank sums a share of the elements and all gather the shares: the traffic is that of an
        all-reduce.
        """
        ranks, count = dist.get_world_size(self.group), values.numel()
        share = -(-count // ranks)
        sent = values.new_zeros(ranks * share)
        sent[:count] = values.reshape(-1)
        received = torch.empty_like(sent)
        if count:
            with _joined(self.function, phase):
                dist.all_to_all_single(received, sent, group=self.group)
        accumulation = reference.accumulation_dtype(values.dtype)
        total = received.view(ranks, share).sum(0, dtype=accumulation).to(values.dtype)
        return self.gather(total, phase).reshape(-1)[:count].view(values.shape)


class Agreement:
    """What a rank brings to a call; :attr:`shard` is there once all ranks agreed."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        """Name to value of what must be the same on every rank."""
        self.held: tuple[int, int] = (0, 0)
        """First token id and number of rows of the head that this rank holds."""
        self.shard: Shard

    def add_tensors(self, tensors: dict[str, Tensor | None]) -> None:
        """Shapes and dtypes, and the values where reading them is free."""
        for name, tensor in tensors.items():
            self.facts[name] = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            if tensor is not None and may_read_values(tensor):
                values = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
                self.facts[f"{name} (checksum of its values)"] = zlib.crc32(values.tobytes())

    def digest(self, function: str) -> int:
        """A number that two calls share if they have the same facts."""
        text = repr((function, sorted(self.facts.items()))).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


@contextmanager
def agreement(function: str, group: dist.ProcessGroup | None, near: Tensor) -> Iterator[Agreement]:
    """Collects what this rank brings; then all ranks go on, or all of them raise.

    An error in the body is told to the other ranks before it is raised, so that none waits for
    this one. Four numbers of each rank are exchanged; objects only where they do not agree. At
    every call: that its arguments were agreed on before, a rank knows of its own alone. Were it to
    go on and another came with new ones, each would wait in an exchange that the other never joins.

    Args:
        near: a tensor on the device of the call.

    Raises:
        ValueError: another rank refused its arguments, they differ between ranks, or the shards do
            not make up a vocabulary.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{function} needs torch.distributed: call init_process_group first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{function}: this rank does not belong to group")
    mine, error = Agreement(), None
    try:
        yield mine
    except Exception as raised:
        error = raised
    digest = mine.digest(function)
    with _joined(function, "check of the arguments"):
        told = _gather_numbers((error is not None, digest, *mine.held), near, group)
    if any(refused or theirs != digest for refused, theirs, _, _ in told):
        _explain(function, group, error, mine)
    vocab_size = _check_layout(function, [(start, size) for _, _, start, size in told])
    mine.shard = Shard(function, group, *mine.held, vocab_size)


def _gather_numbers(
    numbers: Sequence[int], near: Any, group: dist.ProcessGroup | None
) -> list[list[int]]:
    """Those of each rank. Objects would be pickled, and exchanged in two rounds.

    Args:
        near: a tensor on the device of the call, or a wrong argument.
    """
    device: torch.device | None = torch.device("cpu")
    if dist.get_backend(group) in ("nccl", "xccl"):
        on_gpu = isinstance(near, Tensor) and near.device.type != "cpu"
        device = near.device if on_gpu else torch.accelerator.current_accelerator()
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    told = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, mine, group=group)
    gathered: list[list[int]] = torch.stack(told).tolist()
    return gathered


def _explain(
    function: str, group: dist.ProcessGroup | None, error: Exception | None, mine: Agreement
) -> None:
    """Raises, on every rank: one refused its arguments, or they are not the same on all."""
    told: list[Any] = [None] * dist.get_world_size(group)
    refusal = None if error is None else f"{type(error).__name__}: {error}"
    with _joined(function, "check of the arguments"):
        dist.all_gather_object(told, (refusal, {"function": function, **mine.facts}), group)
    if error is not None:
        raise error
    for other, (refused, _) in enumerate(told):
        if refused is not None:
            raise ValueError(f"{function}: rank {other} refused its arguments: {refused}")
    for other, (_, facts) in enumerate(told):
        _check_same(function, other, told[0][1], facts)


def _check_same(function: str, rank: int, first: dict[str, Any], other: dict[str, Any]) -> None:
    for name in {**first, **other}:
        if first.get(name) != other.get(name):
            raise ValueError(
                f"{function}: {name} must be the same on every rank, got {first.get(name)} on rank "
                f"0 and {other.get(name)} on rank {rank}"
            )


def _check_layout(function: str, held: list[tuple[int, int]]) -> int:
    """The size of the vocabulary that the shards cover, each token once."""
    end = 0
    for start, size in sorted(held):
        if start != end:
            problem = "leave out" if start > end else "overlap in"
            low, high = min(start, end), max(start, end)
            listing = ", ".join(f"[{s}, {s + n}) on rank {r}" for r, (s, n) in enumerate(held))
            raise ValueError(
                f"{function}: vocab_start and the rows of weight must cut the vocabulary into "
                f"shards; these {problem} [{low}, {high}): {listing}"
            )
        end = start + size
    return end


@contextmanager
def _joined(function: str, phase: str) -> Iterator[None]:
    """Says what was exchanged when a rank failed to take part."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{function}: the exchange between ranks failed in the {phase} on rank "
            f"{dist.get_rank()}: another rank failed or did not take part in time"
        ) from error
