"""A head cut over the vocabulary gives on every rank what the whole head gives on one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from egspo_kernels import last_backend, linear_token_stats, vocab_parallel_token_stats
from egspo_kernels.shared.shards import Partials, combine
from egspo_kernels.vocab_parallel.exchange import Shard
from tests.kernels import vocab_cases
from tests.kernels.ranks import Ranks, shared_ranks
from tests.kernels.surrogate_cases import rounding_of
from tests.kernels.vocab_cases import Case, compiled, on_ranks, statistics, summed, surrogate


def assert_equal_to_one_rank(case: Case, function: Any, *arguments: Any) -> Any:
    """In float64 to 1e-10; what is exact, exactly."""
    result, gradients = on_ranks(case, function, *arguments)
    expected, expected_gradients = function(None, case, *arguments)
    for mine, truth in zip((*result, *gradients), (*expected, *expected_gradients), strict=True):
        assert (mine is None) == (truth is None)
        if mine is not None:
            torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10, equal_nan=True)
            assert mine.dtype.is_floating_point or torch.equal(mine, truth)
    return result


SIZES = [[5, 12], [1, 16], [3, 9, 5], [15, 1, 1]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("banned", [None, 0, 4, 16])
def test_statistics(sizes: list[int], banned: int | None) -> None:
    case = Case.make(sizes, temperature=0.7, banned_token=banned)
    assert_equal_to_one_rank(case, statistics)
    assert_equal_to_one_rank(dataclasses.replace(case, targets=None), statistics)


@pytest.mark.parametrize("aggregation", ["sum", "mean", "exact"])
@pytest.mark.parametrize("kl", [None, "k3", "exact"])
@pytest.mark.parametrize("sizes", [[1, 16], [3, 9, 5]])
def test_surrogate(sizes: list[int], kl: str | None, aggregation: str) -> None:
    case = Case.make(sizes, temperature=0.7, banned_token=4)
    case.targets[case.targets == 4] = 5
    result = assert_equal_to_one_rank(case, surrogate, kl, aggregation)
    assert bool(result.clipped_high.any()) and bool(result.clipped_low.any())
    assert bool((result.kl[:3] > 0).all()) == (kl is not None)


def test_a_workspace_of_few_rows_and_of_none() -> None:
    """Ranks may have different numbers of chunks; the last one here has one row to a chunk."""
    case = Case.make([1, 2, 40], rows=5, workspace_bytes=6 * 8 * 40)
    assert_equal_to_one_rank(dataclasses.replace(case, options={}), statistics)
    result, gradients = on_ranks(case, statistics)
    expected, expected_gradients = statistics(None, dataclasses.replace(case, options={}))
    for mine, truth in zip((*result, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)
    assert_equal_to_one_rank(Case.make([4, 9], rows=0), statistics)
    small = Case.make([1, 2, 40], workspace_bytes=6 * 8 * 39)
    with pytest.raises(ValueError, match=r"workspace_bytes|rank 2 refused its arguments"):
        on_ranks(small, statistics)


def test_shards_in_any_order_of_the_ranks() -> None:
    case = Case.make([3, 9, 5], banned_token=1)
    shuffled = dataclasses.replace(case, shards=[case.shards[i] for i in (2, 0, 1)])
    assert_equal_to_one_rank(shuffled, statistics)
    assert_equal_to_one_rank(shuffled, surrogate, "exact", "sum")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_token(order: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case.make([4, 4, 4], dtype=dtype)
    case.bias.zero_()
    case.weight[:] = case.weight[0]
    shuffled = dataclasses.replace(case, shards=[case.shards[i] for i in order])
    for banned, lowest in ((None, 0), (0, 1), (7, 0)):
        shuffled.options["banned_token"] = banned
        stats, _ = on_ranks(shuffled, statistics)
        assert stats.argmax.tolist() == [lowest] * 7
        count = 12.0 if banned is None else 11.0
        torch.testing.assert_close(stats.confidence, torch.full_like(stats.entropy, 1 / count))
        torch.testing.assert_close(stats.entropy, torch.full_like(stats.entropy, math.log(count)))


@pytest.mark.parametrize(
    "impossible", [[0, 1, 2], [9, 10, 12], [16], [0, 1, 2, 12, 13, 14, 15, 16]]
)
@pytest.mark.parametrize("reference_too", [True, False])
def test_impossible_tokens(impossible: list[int], reference_too: bool) -> None:
    """Whole shards among them, which have no entropy or maximum of their own."""
    case = Case.make([3, 9, 5], banned_token=4)
    case.targets[:] = torch.tensor([3, 5, 6, 7, 8, 11, 3])
    case.targets[2] = impossible[0]
    case.bias[impossible] = -math.inf
    stats = assert_equal_to_one_rank(case, statistics)
    assert bool(stats.log_prob[2] == -math.inf) and bool(stats.entropy.isfinite().all())
    case.targets[2] = 6
    for kl in ("exact", "k3") if reference_too else (None,):
        result = assert_equal_to_one_rank(case, surrogate, kl, "sum")
        assert bool(result.kl.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution(value: float) -> None:
    case = Case.make([3, 9, 5], dim=1)
    case.weight.abs_()
    case.hidden[2] = value
    (stats, _), (expected, _) = on_ranks(case, statistics), statistics(None, case)
    for name in ("entropy", "log_prob", "confidence"):
        mine, truth = getattr(stats, name), getattr(expected, name)
        assert math.isnan(mine[2])
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10, equal_nan=True)
    assert 0 <= int(stats.argmax[2]) < 17
    assert not math.isfinite(stats.logsumexp[2])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=3))
    vocab = sum(sizes)
    banned = draw(st.none() | st.integers(0, vocab - 1))
    case = Case.make(sizes, rows=draw(st.integers(1, 5)), dim=2, banned_token=banned)
    # Small whole numbers: many ties, inside shards and across them.
    tensors = (case.hidden, case.weight, case.bias, case.ref_hidden, case.ref_weight)
    for tensor in tensors:
        tensor.round_()
    possible = [token for token in range(vocab) if token != banned]
    dropped = draw(st.sets(st.sampled_from(possible), max_size=len(possible) - 1))
    case.bias[sorted(dropped)] = -math.inf
    left = [token for token in possible if token not in dropped]
    rows = case.hidden.shape[0]
    targets = draw(st.lists(st.sampled_from(left), min_size=rows, max_size=rows))
    case.targets[:] = torch.tensor(targets)
    case.options["temperature"] = draw(st.sampled_from([1.0, 0.5, 3.0]))
    order = draw(st.permutations(range(len(sizes))))
    return dataclasses.replace(case, shards=[case.shards[i] for i in order])


@settings(max_examples=25)
@given(cases(), st.sampled_from([None, "k3", "exact"]))
def test_any_shards(case: Case, kl: str | None) -> None:
    assert_equal_to_one_rank(case, statistics)
    assert_equal_to_one_rank(case, surrogate, kl, "sum")


# LLaDA's vocabulary is no multiple of three: 42,155 on two ranks, 42,154 on the third.
GRID = [[1, 1], [1, 999], [4000, 97], [20000, 1, 11999], [42155, 42155, 42154]]


@pytest.mark.parametrize("sizes", GRID, ids=lambda sizes: str(sum(sizes)))
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_on_the_grid(sizes: list[int], scale: float, offset: float) -> None:
    """Error at most 2e-6 nats, and twice that of one rank."""
    case = Case.make(sizes, dim=4, dtype=torch.float32, scale=scale)
    case.bias += offset
    result, gradients = on_ranks(case, statistics)
    baseline, plain = statistics(None, case)
    # Of the same logits: what the product rounds is no matter of the statistics.
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    whole = dataclasses.replace(
        case,
        hidden=torch.eye(7).double(),
        weight=logits.t().double(),
        bias=0.0 * case.bias.double(),
    )
    truth, _ = statistics(None, whole)
    assert torch.equal(result.argmax, truth.argmax)
    for name in ("logsumexp", "entropy", "log_prob", "confidence"):
        mine, exact, eager = (getattr(s, name).double() for s in (result, truth, baseline))
        rounding = 2.0**-23 * float(exact.abs().max())
        allowed = min(2e-6 + rounding, 2 * float((eager - exact).abs().max()) + 1e-6 + rounding)
        assert float((mine - exact).abs().max()) <= allowed, name
    _, exact_gradients = statistics(None, case.to(torch.float64))
    for mine, exact, eager in zip(gradients, exact_gradients, plain, strict=True):
        error, of_eager = (float((g.double() - exact).abs().max()) for g in (mine, eager))
        assert error <= 2 * of_eager + 2.0**-20 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kl", [None, "k3", "exact"])
def test_surrogate_in_low_precision(kl: str | None, dtype: torch.dtype) -> None:
    case = Case.make([100, 900, 3], dtype=dtype, temperature=0.7, banned_token=4)
    result, gradients = on_ranks(case, surrogate, kl, "sum")
    # Rounded to the dtype the product differs between a shard and the whole in nothing.
    expected, expected_gradients = surrogate(None, case, kl, "sum")
    for name in ("loss", "log_prob", "ratio", "kl"):
        mine, truth = getattr(result, name), getattr(expected, name)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, truth, rtol=4 * rounding_of(expected), atol=4e-6)
    for mine, truth in zip(gradients, expected_gradients, strict=True):
        assert mine.dtype == dtype
        # Parts of a sum over the vocabulary that are rounded one by one.
        tolerance = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-18
        error = (mine - truth).abs().max()
        assert bool(error <= tolerance * truth.abs().max())


def test_one_rank_is_a_group_too() -> None:
    case = Case.make([17], banned_token=2)
    assert_equal_to_one_rank(case, statistics)
    assert_equal_to_one_rank(case, surrogate, "exact", "sum")


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 4), (0, 5)])
def test_sum_over_ranks(shape: tuple[int, int]) -> None:
    """Shares of any size; half precision is rounded once, and 256 + 1 + 1 is not 256."""
    ones = torch.ones(shape, dtype=torch.bfloat16)
    places = torch.arange(ones.numel()).view(shape)
    for answer in shared_ranks(3).call(summed, [256 * ones, ones, ones]):
        assert torch.equal(answer, 258 * ones)
    for answer in shared_ranks(3).call(summed, [places, 10 * places, 100 * places]):
        assert torch.equal(answer, 111 * places)


def test_a_target_that_no_shard_holds_is_nan() -> None:
    """On a GPU, where targets are not read: everything else is as it was."""
    whole = Shard("test", None, 4, 3, 9).local_targets(torch.tensor([3, 4, 6, 7, 9, -1]))
    assert whole.tolist() == [-1, 0, 2, -1, -1, -1]
    partials = Partials(*torch.ones(7, 2, 3))
    rows = combine(partials, torch.zeros(2, 3).long(), torch.tensor([8, 9, -1]), 9, 1.0)
    assert rows.log_prob.isnan().tolist() == [False, True, True]
    assert bool(rows.entropy.isfinite().all())


def test_called_from_a_compiled_function() -> None:
    case = Case.make([5, 12])
    stats, (grad_hidden, _) = on_ranks(case, compiled)
    hidden = (2 * case.hidden).requires_grad_()
    expected = linear_token_stats(hidden, case.weight, case.targets)
    (gradient,) = torch.autograd.grad(expected.entropy.sum(), hidden)
    torch.testing.assert_close(stats.entropy, expected.entropy.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_hidden, 2 * gradient, rtol=1e-10, atol=1e-10)


def test_needs_a_group() -> None:
    with pytest.raises(ValueError, match=r"vocab_parallel_token_stats needs torch\.distributed"):
        vocab_parallel_token_stats(torch.zeros(2, 3), torch.zeros(4, 3), None, vocab_start=0)
    assert last_backend("vocab_parallel_token_stats") is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"shards": [(0, 3), (2, 9), (12, 5)]}, r"overlap in \[2, 3\)"),
    ({"shards": [(0, 3), (4, 8), (12, 5)]}, r"leave out \[3, 4\)"),
    ({"shards": [(1, 3), (4, 8), (12, 5)]}, r"leave out \[0, 1\)"),
    ({"shards": [(0, 3), (0, 3), (3, 14)]}, r"overlap in \[0, 3\).*\[0, 3\) on rank 1"),
    ({"targets": torch.tensor([0, 1, 2, 3, 4, 5, 17])}, r"targets must lie in \[0, 17\)"),
    ({"targets": torch.tensor([0, 1, 2, 3, 4, 5, -1])}, r"targets must lie in \[0, 17\)"),
    ({"targets": torch.zeros(6, dtype=torch.int64)}, r"targets must have shape \(7,\)"),
    ({"targets": torch.zeros(7)}, "targets must be int64 or int32"),
    ({"options": {"banned_token": 17}}, r"banned_token must lie in \[0, 17\)"),
    ({"options": {"temperature": 0.0}}, "temperature must be finite"),
    ({"options": {"backend": "cpp"}}, "backend 'cpp' cannot run"),
]


@pytest.mark.parametrize(("changes", "match"), REFUSED)
def test_bad_arguments_are_refused_on_every_rank(changes: dict[str, Any], match: str) -> None:
    case = dataclasses.replace(Case.make([3, 9, 5]), **changes)
    for error in answers_of(statistics, case):
        with pytest.raises(Exception, match=match):
            raise error


ONE_DIFFERS: list[tuple[dict[str, Any], str, str]] = [
    # What rank 1 brings, how rank 1 is told, and how the others are.
    ({"temperature": -1.0}, "^temperature must be", "rank 1 refused its arguments: ValueError"),
    ({"workspace_bytes": 8}, "^workspace_bytes", "rank 1 refused.*workspace_bytes must hold"),
    ({"weight": torch.zeros(17, 4).double()}, "^weight must have", "rank 1 refused.*weight must"),
    ({"vocab_start": -1}, "vocab_start must be", "rank 1 refused.*vocab_start"),
    (
        {"temperature": 0.5},
        "temperature must be the same on every rank, got 1.0 on rank 0 and 0.5 on rank 1",
        "temperature must be the same on every rank, got 1.0 on rank 0 and 0.5 on rank 1",
    ),
    ({"banned_token": 2}, "banned_token must be the same", "banned_token must be the same"),
    ({"targets": None}, "targets must be the same", "targets must be the same"),
    (
        {"targets": torch.arange(7)},
        r"targets \(checksum of its values\) must be the same",
        r"targets \(checksum of its values\) must be the same",
    ),
    (
        {"hidden": torch.zeros(6, 5).double(), "targets": torch.zeros(6).long()},
        r"must be the same on every rank",
        r"must be the same on every rank",
    ),
]


@pytest.mark.parametrize(("changes", "own", "others"), ONE_DIFFERS)
def test_a_rank_that_differs_is_refused_on_every_rank(
    changes: dict[str, Any], own: str, others: str
) -> None:
    case = Case.make([3, 9, 5])
    for rank, error in enumerate(answers_of(vocab_cases.differing, case, 1, changes)):
        with pytest.raises(Exception, match=own if rank == 1 else others):
            raise error
    assert_equal_to_one_rank(case, statistics)  # and the group goes on


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (vocab_cases.other_function, "function must be the same on every rank"),
        (vocab_cases.partly_trained, "gradient of hidden must be the same on every rank"),
    ],
)
def test_ranks_that_would_wait_for_each_other_are_refused(function: Any, match: str) -> None:
    for error in answers_of(function, Case.make([3, 9, 5])):
        with pytest.raises(ValueError, match=match):
            raise error


def answers_of(function: Any, case: Case, *arguments: Any) -> list[Exception]:
    """The exceptions of three ranks: each must have raised."""
    answers = shared_ranks(3).call(function, case, *arguments)
    assert all(isinstance(answer, Exception) for answer in answers), answers
    return answers


def test_a_rank_that_stays_away_is_not_waited_for_for_ever() -> None:
    ranks = Ranks(2, timeout=1.0)
    try:
        error, _ = ranks.call(vocab_cases.absent, Case.make([3, 9]), 1, 2.0)
    finally:
        ranks.close()
    with pytest.raises(RuntimeError, match="check of the arguments on rank 0: another rank"):
        raise error


def test_a_rank_that_dies_between_the_passes_is_noticed() -> None:
    ranks = Ranks(3, timeout=2.0)
    try:
        *errors, dead = ranks.call(vocab_cases.dying_between_the_passes, Case.make([3, 9, 5]), 2)
    finally:
        ranks.close()
    assert isinstance(dead, EOFError)
    for rank, error in enumerate(errors):
        with pytest.raises(RuntimeError, match=f"backward pass on rank {rank}: another rank"):
            raise error
