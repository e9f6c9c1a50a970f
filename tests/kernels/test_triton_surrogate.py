"""The Triton surrogate: in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from egspo_kernels import last_backend, stepwise_surrogate, token_stats
from egspo_kernels.shared.objective import Objective, Steps, step_objective
from tests.helpers.marks import first_fast
from tests.kernels.surrogate_cases import (
    DEVICE,
    FIELDS,
    Problem,
    assert_close_enough,
    assert_same_bits,
    is_nan,
    rounding_of,
)

pytest.importorskip("triton")
# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("round_to_nearest"),
]

INF, NAN = math.inf, math.nan
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KLS = [None, "k3", "exact"]
AGGREGATIONS = ["sum", "mean", "exact"]


def check_against_reference(problem: Problem) -> None:
    value, gradient = problem.solve("triton")
    assert last_backend("stepwise_surrogate") == "triton"
    truth, true_gradient = problem.double().solve("reference")
    baseline, plain_gradient = problem.solve("reference")
    rounding = rounding_of(truth)
    for name in FIELDS:
        result = getattr(value, name)
        assert result.dtype == torch.float32
        assert_close_enough(result, getattr(truth, name), getattr(baseline, name), rounding, name)
    assert torch.equal(value.clipped_low, truth.clipped_low)
    assert torch.equal(value.clipped_high, truth.clipped_high)
    assert int(value.clamped) == int(truth.clamped) and value.clamped.dtype == torch.int64
    assert gradient.dtype == problem.logits.dtype
    assert_close_enough(gradient, true_gradient, plain_gradient, rounding, "gradient")
    banned = problem.options["banned_token"]
    if banned is not None:
        assert bool((gradient[:, banned] == 0).all())


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", first_fast(reversed(FLOATS)))
def test_every_objective(kl: str | None, aggregation: str, dtype: torch.dtype) -> None:
    check_against_reference(Problem.make(6, 700, dtype, kl, aggregation))


@pytest.mark.parametrize(
    ("number", "rows", "vocab"),
    first_fast(
        (
            (number, rows, vocab)
            for number, (rows, vocab) in enumerate(
                [
                    *((7, 1000), (0, 2), (1, 4097), (7, 1)),
                    *((0, 1), (0, 1000), (0, 4097), (1, 1), (1, 2), (1, 1000), (7, 2), (7, 4097)),
                    *((1, 32000), (1, 126464)),
                ]
            )
        ),
        fast=4,
    ),
)
@pytest.mark.parametrize("kl", KLS)
def test_shapes(number: int, rows: int, vocab: int, kl: str | None) -> None:
    dtype, aggregation = FLOATS[number % 3], AGGREGATIONS[number // 3 % 3]
    check_against_reference(Problem.make(rows, vocab, dtype, kl, aggregation))


@pytest.mark.parametrize("aggregation", first_fast(AGGREGATIONS))
@pytest.mark.parametrize("kl", [None, "k3", "k3 given", "exact"])
def test_more_steps_and_tokens_than_a_program_takes(aggregation: str, kl: str | None) -> None:
    """The step kernel by itself, against the reference and its autograd."""
    from egspo_kernels.triton_kernels import steps as kernels

    count = 1100 if (aggregation, kl) == ("sum", "exact") else 40
    assert count > kernels.BLOCK_STEPS and kernels.BLOCK_TERMS < 1100
    tokens = kernels.BLOCK_TOKENS + 9
    generator = torch.Generator().manual_seed(0)
    token, other = (-torch.rand(2, tokens, generator=generator)).double().unbind()
    ids = torch.randint(40, (tokens,), generator=generator) * (count // 40)
    old, advantage, given_ref = torch.randn(3, count, generator=generator).double().unbind()
    old[5], given_ref[7] = 30.0, -40.0
    given = kl == "k3 given"
    kind = "k3" if given else kl
    objective = Objective(0.2, 0.3, 0.1 if kl else 0.0, kind, aggregation)  # type: ignore[arg-type]
    steps = Steps(ids, old, advantage, None, given_ref if given else None)
    token.requires_grad_()
    other = -other if kind == "exact" else other
    kl_tokens = other.requires_grad_() if kind == "exact" else None
    expected = step_objective(
        objective,
        token,
        steps if kind != "k3" or given else steps.with_reference(other, objective),
        kl_tokens,
    )
    expected.loss.backward()
    on_device = Steps(*(None if t is None else t.float().to(DEVICE) for t in steps))
    on_device = on_device._replace(step_ids=ids.to(DEVICE))
    value, coefficient, kl_coefficient = kernels.step_objective(
        objective,
        token.detach().float().to(DEVICE),
        None if kl in (None, "k3 given") else other.detach().float().to(DEVICE),
        on_device,
    )
    for name, result, truth in zip(value._fields, value, expected, strict=True):
        tolerance = 1e-5 * max(1.0, float(truth.detach().double().abs().max()))
        torch.testing.assert_close(
            result.cpu().double(), truth.double(), rtol=1e-5, atol=tolerance, msg=name
        )
    assert int(value.clamped) == (2 if given else 1)
    assert token.grad is not None
    torch.testing.assert_close(coefficient.cpu().double()[ids], token.grad, rtol=1e-4, atol=1e-8)
    if kl_tokens is not None:
        assert kl_tokens.grad is not None
        torch.testing.assert_close(kl_coefficient.cpu().double()[ids], kl_tokens.grad)


def test_no_steps() -> None:
    empty = torch.empty(0, device=DEVICE)
    ids = empty.long()
    logits = torch.empty(0, 5, device=DEVICE, requires_grad=True)
    result = stepwise_surrogate(
        logits, ids, ids, empty, empty, clip_low=0.2, clip_high=0.2, backend="triton"
    )
    assert float(result.loss.detach()) == 0.0 and int(result.clamped) == 0
    result.loss.backward()
    assert logits.grad is not None and logits.grad.shape == (0, 5)


def test_reference_log_prob_may_be_given() -> None:
    problem = Problem.make(6, 300, kl="k3")
    given = problem.old_log_prob + 0.1
    check_against_reference(problem.replace(ref_log_prob=given, ref_logits=None))


def test_argument_dtypes_and_strides() -> None:
    problem = Problem.make(6, 300, kl="exact")
    expected, gradient = problem.solve("triton")
    spread = torch.empty(10, 2, dtype=torch.float64, device=DEVICE)[::2, 0]
    wide = torch.empty(6, 400, device=DEVICE)
    columns, ref_columns = (torch.empty(300, 6, device=DEVICE).t() for _ in range(2))
    other = problem.replace(
        logits=wide[:, 50:350].copy_(problem.logits),
        targets=problem.targets.int(),
        step_ids=problem.step_ids.int(),
        old_log_prob=spread.copy_(problem.old_log_prob),
        advantage=problem.advantage.double(),
        weights=problem.options["weights"].double(),
        ref_logits=ref_columns.copy_(problem.options["ref_logits"]),
    )
    value, other_gradient = other.solve("triton")
    for result, truth in zip(value, expected, strict=True):
        assert_same_bits(result, truth)
    assert_same_bits(other_gradient, gradient)
    assert_same_bits(
        other.replace(logits=columns.copy_(problem.logits)).solve("triton")[1], gradient
    )


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.slow
def test_special_logits(kl: str | None) -> None:
    """-inf, ties, flat rows, a large offset, a banned target and banned NaN: as the reference."""
    problem = Problem.make(6, 5000, kl=kl, steps=6)
    banned = problem.options["banned_token"]
    logits, targets = problem.logits, problem.targets
    targets[0] = 3
    if kl != "k3":  # whose estimate is then inf - inf
        targets[5] = banned
    ref_logits = problem.options["ref_logits"]
    for rows in (logits, logits if ref_logits is None else ref_logits):
        rows[0, 4:] = -INF  # one block is empty
        rows[1, ::2] = -INF
        rows[2] = 1.0
        rows[3] += 1000.0
        rows[:, banned] = 7.0
    targets[1] |= 1
    check_against_reference(problem.replace(step_ids=torch.arange(6, device=DEVICE)))
    expected, gradient = problem.solve("triton")
    logits[:, banned] = NAN
    value, other_gradient = problem.solve("triton")
    assert_same_bits(value.loss, expected.loss)
    assert_same_bits(other_gradient, gradient)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("kl", KLS)
def test_what_is_not_a_number_is_not_hidden(bad: float, kl: str | None) -> None:
    problem = Problem.make(4, 300, kl=kl, steps=2)
    problem.step_ids[:] = torch.tensor([0, 1, 0, 1])
    problem.logits[1, 200] = bad
    value, gradient = problem.solve("triton")
    assert is_nan(value.loss) and value.log_prob.isnan().tolist() == [False, True, False]
    assert bool(gradient[1].isnan().any()) and bool(gradient[::2].isfinite().all())


def test_reference_that_excludes_a_likely_token() -> None:
    problem = Problem.make(2, 300, kl="exact", steps=2)
    problem.options["ref_logits"][0, problem.logits[0].argmax()] = -INF
    value = problem.run("triton")
    assert value.kl[problem.step_ids[0]] == INF


def unread(problem: Problem, rows: slice) -> Tensor:
    """The gradient when some logits turn infinite between forward and backward."""
    logits = problem.logits.clone().requires_grad_()
    loss = problem.run("triton", logits).loss
    logits.data[rows] = INF
    ref_logits = problem.options["ref_logits"]
    if ref_logits is not None:
        ref_logits.data[rows] = INF
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def test_rows_that_contribute_nothing_are_not_read() -> None:
    """Zero advantage, the flat side of a clip, zero weight, a clamped ratio."""
    problem = Problem.make(5, 5000, steps=4)
    ids = torch.tensor([0, 1, 2, 3, 4], device=DEVICE)
    log_prob = problem.replace(step_ids=ids).run("triton").log_prob
    shift = torch.tensor([0.0, 1.0, 0.1, 50.0, 0.0], device=DEVICE)  # log of the ratio
    problem = problem.replace(
        step_ids=ids,
        old_log_prob=log_prob - shift,
        advantage=torch.tensor([0.0, 1.0, 1.0, -1.0, 1.0], device=DEVICE),
    )
    problem.options["weights"][2] = 0.0
    gradient = unread(problem, slice(0, 4))
    assert bool((gradient[:4] == 0).all())
    assert bool(gradient[4].isfinite().all()) and bool(gradient[4].any())
    assert not bool(unread(problem, slice(0, 5))[4].isfinite().all()), "others are read"


def test_exact_kl_reaches_clipped_rows_and_beta_zero_does_not() -> None:
    problem = Problem.make(3, 300, kl="exact", steps=2)
    problem = problem.replace(advantage=problem.advantage * 0)
    gradient = problem.solve("triton")[1]
    assert bool(gradient.any(1).all())
    free = problem.replace(beta=0.0)
    assert bool(free.run("triton").kl.any()), "still measured"
    assert not bool(unread(free, slice(0, 3)).any())


@pytest.mark.slow
def test_incoming_gradient_scales() -> None:
    problem = Problem.make(6, 300, kl="exact")
    value, gradient = problem.solve("triton")
    doubled, twice = problem.solve("triton", scale=-2.0)
    assert_same_bits(value.loss, doubled.loss)
    assert_same_bits(twice, 0.0 - 2.0 * gradient)
    assert not bool(problem.solve("triton", scale=0.0)[1].any())


@pytest.mark.parametrize("kl", KLS)
def test_a_row_does_not_depend_on_its_batch(kl: str | None) -> None:
    """Bitwise; and the log-probabilities are those of token_stats."""
    rows = 5
    ids = torch.arange(rows, device=DEVICE)
    problem = Problem.make(rows, 5000, torch.bfloat16, kl, steps=rows - 1).replace(step_ids=ids)
    whole, gradient = problem.solve("triton")
    stats = token_stats(
        problem.logits,
        problem.targets,
        temperature=0.7,
        banned_token=problem.options["banned_token"],
        backend="triton",
    )
    assert stats.log_prob is not None
    assert_same_bits(whole.log_prob, stats.log_prob)
    for row in (0, 3):
        part = slice(row, row + 1)
        ref_logits = problem.options["ref_logits"]
        alone, alone_gradient = problem.replace(
            logits=problem.logits[part],
            targets=problem.targets[part],
            step_ids=ids[:1],
            old_log_prob=problem.old_log_prob[part],
            advantage=problem.advantage[part],
            weights=problem.options["weights"][part],
            ref_logits=None if ref_logits is None else ref_logits[part],
        ).solve("triton")
        for name in FIELDS[1:]:
            assert_same_bits(getattr(alone, name), getattr(whole, name)[part])
        assert_same_bits(alone_gradient, gradient[part])


def test_run_to_run() -> None:
    problem = Problem.make(9, 300, torch.bfloat16, "exact", steps=3)
    first, gradient = problem.solve("triton")
    for _ in range(2):
        again, same_gradient = problem.solve("triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert_same_bits(gradient, same_gradient)


def test_tokens_and_steps_out_of_range_do_not_vanish() -> None:
    """Values are not checked on a GPU, nor by the operator."""
    from egspo_kernels.triton_kernels.surrogate import _backward, _forward

    problem = Problem.make(4, 300)
    steps = problem.old_log_prob.shape[0]
    for change in ({"step_ids": steps}, {"step_ids": -1}, {"targets": 300}, {"targets": -1}):
        ((name, value),) = change.items()
        arguments = {"targets": problem.targets.clone(), "step_ids": problem.step_ids.clone()}
        arguments[name][2] = value
        targets, step_ids = arguments["targets"], arguments["step_ids"]
        vectors = (problem.old_log_prob, problem.advantage, None, None, None)
        rest = (0.2, 0.2, 0.0, None, "sum", 1.0, None)
        outputs = _forward(problem.logits, targets, step_ids, *vectors, *rest)
        assert is_nan(outputs[0]), change
        one = torch.ones((), device=DEVICE)
        gradient = _backward(one, problem.logits, targets, step_ids, None, outputs[7:], 1.0, None)
        assert bool(gradient[2].isnan().all()), change


@pytest.mark.gpu
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_real_size(kl: str | None, dtype: torch.dtype) -> None:
    """LLaDA's vocabulary; nothing waits for the GPU."""
    problem = Problem.make(300, 126464, dtype, kl, steps=64)
    check_against_reference(problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, gradient = problem.solve("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again, same_gradient = problem.solve("triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert_same_bits(gradient, same_gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("kl", [None, "exact"])
def test_offsets_beyond_31_bits(kl: str | None) -> None:
    small = Problem.make(4, 126464, torch.bfloat16, kl, steps=4)
    expected, expected_gradient = small.solve("triton")
    rows = torch.tensor([0, 7, 16983, 16999], device=DEVICE)
    assert 16983 * 126464 > 2**31

    def spread(values: Tensor) -> Tensor:
        large = values.new_zeros((17000, *values.shape[1:]))
        large[rows] = values
        return large

    step_ids = torch.full((17000,), 4, device=DEVICE)
    step_ids[rows] = small.step_ids
    ref_logits = small.options["ref_logits"]
    large = small.replace(
        logits=spread(small.logits),
        targets=spread(small.targets),
        step_ids=step_ids,
        ref_logits=None if ref_logits is None else spread(ref_logits),
    )
    value, gradient = large.solve("triton")
    assert_same_bits(value.log_prob[:4], expected.log_prob[:4])
    assert_same_bits(gradient[rows], expected_gradient)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    rows=st.integers(1, 6),
    vocab=st.integers(2, 700),
    steps=st.integers(1, 4),
    kl=st.sampled_from(KLS),
    aggregation=st.sampled_from(AGGREGATIONS),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    holes=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_problem(
    rows: int,
    vocab: int,
    steps: int,
    kl: str | None,
    aggregation: str,
    dtype: torch.dtype,
    scale: float,
    holes: bool,
    seed: int,
) -> None:
    problem = Problem.make(rows, vocab, dtype, kl, aggregation, steps=steps, seed=seed)
    problem.logits.mul_(scale)
    if holes:
        hole = problem.targets - 1  # of probability zero, for both policies
        for values in (problem.logits, problem.options["ref_logits"]):
            if values is not None:
                values[torch.arange(rows, device=DEVICE), hole] = -INF
    check_against_reference(problem)
