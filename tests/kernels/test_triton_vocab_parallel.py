"""The Triton backend of a head cut over ranks: in the interpreter, and with NCCL on GPUs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.marks import slow
from tests.kernels.surrogate_cases import FIELDS, assert_close_enough, rounding_of
from tests.kernels.vocab_cases import Case, on_gpu, on_ranks, statistics, surrogate

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, and gloo is for CPU tensors"
)


def assert_close_to_one_rank(
    case: Case, function: Any, *arguments: Any, names: tuple[str, ...], backend: str = "gloo"
) -> Any:
    """Error against float64 at most twice that of plain PyTorch on one rank."""
    case = dataclasses.replace(case, options=case.options | {"backend": "triton"})
    one = dataclasses.replace(case, options=case.options | {"backend": "reference"})
    result, gradients = on_ranks(case, function, *arguments, backend=backend)
    if backend == "gloo":
        baseline, plain = function(None, one, *arguments)
    else:
        baseline, plain = on_gpu(None, function, one, *arguments)
    truth, exact = function(None, one.to(torch.float64), *arguments)
    rounding = 2.0**-20 if function is statistics else rounding_of(truth)
    for name in names:
        values: list[Tensor] = [getattr(r, name) for r in (result, truth, baseline)]
        assert_close_enough(*values, rounding, name)
    for mine, right, eager in zip(gradients, exact, plain, strict=True):
        assert_close_enough(mine, right, eager, 4 * rounding, "gradient")
    return result, truth


STATS = ("logsumexp", "entropy", "log_prob", "confidence")


@interpreted
@pytest.mark.parametrize("sizes", [[5, 12], [3, 900, 1]])
@pytest.mark.parametrize("banned", [None, 4])
def test_statistics(sizes: list[int], banned: int | None) -> None:
    case = Case.make(sizes, dtype=torch.float32, temperature=0.7, banned_token=banned)
    result, truth = assert_close_to_one_rank(case, statistics, names=STATS)
    assert torch.equal(result.argmax, truth.argmax)


@interpreted
@pytest.mark.parametrize("kl", [None, "k3", "exact"])
def test_surrogate(kl: str | None) -> None:
    case = Case.make([3, 900, 1], dtype=torch.float32, temperature=0.7, banned_token=903)
    case.targets[0] = 1
    assert_close_to_one_rank(case, surrogate, kl, "sum", names=FIELDS)


@interpreted
@pytest.mark.parametrize("impossible", slow([[0, 1, 2], [16], [0, 1, 2, 12, 13, 14, 15, 16]]))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_impossible_tokens(impossible: list[int]) -> None:
    """A shard without a token to choose has a banned one alone, too."""
    case = Case.make([3, 9, 1, 4], dtype=torch.float32, banned_token=12)
    case.targets[:] = torch.tensor([3, 5, 6, 7, 8, 11, 3])
    case.bias[impossible] = -math.inf
    result, truth = assert_close_to_one_rank(case, statistics, names=STATS)
    assert torch.equal(result.argmax, truth.argmax)
    for kl in ("k3", "exact"):
        assert_close_to_one_rank(case, surrogate, kl, "sum", names=FIELDS)


@interpreted
def test_ties_go_to_the_lowest_token() -> None:
    case = Case.make([4, 4, 4], dtype=torch.float32, banned_token=0, backend="triton")
    case.bias.zero_()
    case.weight[:] = case.weight[0]
    backwards = dataclasses.replace(case, shards=case.shards[::-1])
    stats, _ = on_ranks(backwards, statistics)
    assert stats.argmax.tolist() == [1] * 7


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kl", [None, "k3", "exact"])
def test_on_gpus(world_size: int, kl: str | None) -> None:
    """LLaDA's vocabulary, a rank to each GPU."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    sizes = {1: [126464], 2: [63000, 63464]}[world_size]
    case = Case.make(sizes, dtype=torch.float32, temperature=0.7, banned_token=126336)
    result, truth = assert_close_to_one_rank(case, statistics, names=STATS, backend="nccl")
    assert torch.equal(result.argmax, truth.argmax)
    assert_close_to_one_rank(case, surrogate, kl, "sum", names=FIELDS, backend="nccl")
