"""Triton sampling: the tokens of the reference, their statistics, the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from egspo_kernels import (
    SampledTokens,
    UnavailableBackendError,
    last_backend,
    reference,
    sample_tokens,
)
from egspo_kernels.random import BLOCK_COUNTERS, group_exponential

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from egspo_kernels.triton_kernels.noise import (  # noqa: E402
    exponential,
    exponentials,
    uniform,
)
from egspo_kernels.triton_kernels.tiles import power_of_two  # noqa: E402
from tests.helpers.marks import slow  # noqa: E402

# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan


def logits_of(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 131 + vocab)
    return (3 * torch.randn(rows, vocab, generator=generator)).to(dtype).to(DEVICE)


def ids_of(rows: int) -> Tensor:
    """Identities on both sides of zero and beyond 32 bits."""
    return (torch.arange(rows, device=DEVICE) - 2) * (2**33 + 7)


def triton_sample(logits: Tensor, row_ids: Tensor, **kwargs: object) -> SampledTokens:
    arguments = {"temperature": 1.0, "seed": 3, "step": 5} | kwargs
    sampled = sample_tokens(logits, row_ids=row_ids, backend="triton", **arguments)
    assert last_backend("sample_tokens") == "triton"
    return sampled


def assert_same(left: SampledTokens, right: SampledTokens) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


TEMPERATURES = [(1.0, 1.0), (0.7, 1.0), (0.7, 0.7), (1.0, 2.0), (0.5, 2.0), (0.0, 1.0), (0.0, 0.5)]


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [
        (4, 1000, torch.float32),
        *slow([(4, 2, torch.float16), (0, 5, torch.float32), (1, 1, torch.float32)]),
        *slow([(3, 4097, torch.bfloat16), (1, 32000, torch.float16)]),
    ],
)
@pytest.mark.parametrize(("temperature", "entropy_temperature"), TEMPERATURES)
def test_agrees_with_the_reference(
    rows: int, vocab: int, dtype: torch.dtype, temperature: float, entropy_temperature: float
) -> None:
    check_against_reference(rows, vocab, dtype, temperature, entropy_temperature)


@pytest.mark.slow
def test_agrees_with_the_reference_at_the_size_of_llada() -> None:
    check_against_reference(1, 126464, torch.bfloat16, 0.8, 1.0)


def check_against_reference(
    rows: int, vocab: int, dtype: torch.dtype, temperature: float, entropy_temperature: float
) -> None:
    logits, ids = logits_of(rows, vocab, dtype), ids_of(rows)
    banned = vocab // 3 if vocab > 1 else None
    seed, step = 2**63 + 11, 2**32 - 1
    sampled = triton_sample(
        logits,
        ids,
        temperature=temperature,
        seed=seed,
        step=step,
        banned_token=banned,
        entropy_temperature=entropy_temperature,
    )
    settings_ = (temperature, seed, step, ids, banned, entropy_temperature)
    assert torch.equal(sampled.token, reference.sample_tokens(logits, *settings_).token)
    exact = reference.sample_tokens(logits.double(), *settings_)
    plain = reference.sample_tokens(logits, *settings_)
    assert torch.equal(sampled.token, exact.token) and sampled.token.dtype == torch.int64
    for name in ("log_prob", "confidence", "entropy"):
        value, truth, baseline = (getattr(s, name) for s in (sampled, exact, plain))
        assert value.shape == (rows,) and value.dtype == torch.float32
        error = (value.double() - truth).abs()
        allowed = (baseline.double() - truth).abs().amax() if rows else 0
        assert bool((error <= 2 * allowed + 2e-6).all()), name


@triton.jit(do_not_specialize=["seed", "step"])
def noise_kernel(out, row_ids, seed: tl.int64, step: tl.int64, first, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    counters = first + columns // 4
    noise = exponentials(seed, step, tl.load(row_ids + row), counters, columns % 4)
    tl.store(out + row * BLOCK + columns, noise)


@triton.jit
def uniform_kernel(words, uniforms, exponentials, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    u = uniform(tl.load(words + columns).to(tl.uint32))
    tl.store(uniforms + columns, u)
    tl.store(exponentials + columns, exponential(u))


@pytest.mark.parametrize(
    ("seed", "step"), [(0, 0), (-(2**63), 2**32 - 1), (2**40 + 3, 2**31), (2**31 + 5, 1)]
)
def test_noise_is_that_of_the_reference(seed: int, step: int) -> None:
    """Of columns, and of blocks, whose counters are negative int32."""
    ids = ids_of(4)
    for first in (0, 5, BLOCK_COUNTERS):
        noise = torch.empty(4, 512, device=DEVICE)
        signed = first - 2**32 if first >= 2**31 else first
        noise_kernel[(4,)](noise, ids, seed, step, signed, BLOCK=512)
        groups = torch.arange(first, first + 128, device=DEVICE)[None, :]
        expected = group_exponential(seed, step, ids, groups)
        torch.testing.assert_close(noise, expected, rtol=1e-6, atol=0)


def test_uniform_numbers_are_those_of_the_reference_to_the_last_bit() -> None:
    """All magnitudes, the ends, and the words where rounding twice would differ from once."""
    edges = [0, 1, 2**23, 2**24 - 1, 2**24, 2**31, 2**32 - 1, 2**32 - 2**8, 2**32 - 2**7 - 1]
    odd = [2**bits + 2 ** (bits - 23) * k - 1 for bits in range(24, 32) for k in (1, 2, 3)]
    ties = [2**bits + 2 ** (bits - 24) * k for bits in range(24, 32) for k in (1, 2, 3)]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(2**32, (2048 - len(edges + odd + ties),), generator=generator)
    words = torch.cat([torch.tensor(edges + odd + ties), random]).to(DEVICE)
    uniforms, exponentials = torch.empty(2, 2048, device=DEVICE)
    uniform_kernel[(1,)](words, uniforms, exponentials, BLOCK=2048)
    expected = ((words.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)
    assert torch.equal(uniforms, expected)
    exact = -torch.log1p(-expected.double())
    # The sample is decided by the smallest values: their error must be relative.
    torch.testing.assert_close(exponentials.double(), exact, rtol=5e-7, atol=0)


@triton.jit
def power_kernel(exponents, powers, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    power, _ = power_of_two(tl.load(exponents + places))
    tl.store(powers + places, power)


def test_powers_without_the_special_unit() -> None:
    """As exact as those of the hardware are, and nothing far below."""
    exponents = torch.cat([torch.linspace(-126, 1, 2044), torch.tensor([-INF, -1e30, -3e4, -127])])
    powers = torch.empty(2048, device=DEVICE)
    power_kernel[(1,)](exponents.to(DEVICE), powers, BLOCK=2048)
    exact = exponents[:-4].double().exp2()
    torch.testing.assert_close(powers[:-4].cpu().double(), exact, rtol=2.5e-7, atol=0)
    assert bool((powers[-4:] <= 2.0**-126).all())


@pytest.mark.slow
def test_frequencies() -> None:
    count = 20000 if DEVICE == "cuda" else 120  # 20 ms each in the interpreter
    temperature, banned = 0.7, 3
    logits = torch.tensor([[0.0, 0.6, 1.0, 9.0, -0.2]], device=DEVICE)
    tokens = triton_sample(
        logits.expand(count, -1),
        torch.arange(count, device=DEVICE),
        temperature=temperature,
        banned_token=banned,
    ).token.cpu()
    allowed = [0, 1, 2, 4]
    expected = (logits[0, allowed].double().cpu() / temperature).softmax(0) * count
    counts = torch.bincount(tokens, minlength=5).double()
    assert counts[banned] == 0
    statistic = float(((counts[allowed] - expected) ** 2 / expected).sum())
    assert statistic < 16.3  # chi-square with 3 degrees of freedom, one in a thousand


def test_a_row_is_bitwise_independent_of_its_batch() -> None:
    logits, ids = logits_of(5, 6001, torch.bfloat16), ids_of(5)
    whole = triton_sample(logits, ids, temperature=0.9)
    assert_same(whole, triton_sample(logits, ids, temperature=0.9))
    order = torch.tensor([3, 0], device=DEVICE)
    some = triton_sample(logits[order], ids[order], temperature=0.9)
    assert_same(some, SampledTokens(*(value[order] for value in whole)))
    other = triton_sample(logits, ids + 1, temperature=0.9)
    assert not torch.equal(other.token, whole.token)


def test_strides() -> None:
    logits, ids = logits_of(3, 4200), ids_of(3)
    expected = triton_sample(logits, ids)
    padded = torch.nn.functional.pad(logits, (3, 2), value=99.0)[:, 3:4203]
    assert_same(triton_sample(padded, ids), expected)
    assert_same(triton_sample(logits.t().contiguous().t(), ids), expected)
    assert_same(triton_sample(logits, ids.repeat_interleave(2)[::2]), expected)


def test_greedy_takes_the_lowest_id_among_ties_across_blocks() -> None:
    logits = torch.zeros(2, 9000, device=DEVICE)
    logits[1, [8500, 4500, 4096]] = 1.0
    sampled = triton_sample(logits, ids_of(2), temperature=0, banned_token=4096)
    assert sampled.token.tolist() == [0, 4500] and sampled.log_prob.tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("padding", [0, 5000])
def test_special_rows(temperature: float, padding: int) -> None:
    rows = [[-INF, 0, -INF], [-3e38, 3e38, -INF], [-INF] * 3, [0, NAN, 0], [NAN] * 3, [INF, 0, 0]]
    logits = torch.nn.functional.pad(torch.tensor(rows), (0, padding), value=-INF).to(DEVICE)
    sampled = triton_sample(logits, ids_of(6), temperature=temperature, banned_token=2)
    assert sampled.token[:2].tolist() == [1, 1]
    assert bool(((sampled.token >= 0) & (sampled.token < logits.shape[1])).all())
    assert sampled.entropy[:2].tolist() == [0, 0] and sampled.confidence[:2].tolist() == [1, 1]
    assert bool(sampled.entropy[2:].isnan().all() & sampled.confidence[2:].isnan().all())
    if temperature > 0:
        assert bool(sampled.log_prob[2:].isnan().all())
        assert sampled.log_prob[:2].tolist() == [0, 0]


values = st.one_of(st.floats(-20, 20, width=16), st.sampled_from([0.0, 1.0, -INF, -6e4]))


@pytest.mark.slow
@settings(max_examples=25)
@given(
    row=st.lists(values, min_size=2, max_size=40).filter(lambda row: max(row) > -INF),
    temperature=st.just(0.0) | st.floats(0.05, 20),
    entropy_temperature=st.floats(0.1, 10),
    seed=st.integers(-(2**63), 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    row_id=st.integers(-(2**63), 2**63 - 1),
)
def test_any_values(
    row: list[float],
    temperature: float,
    entropy_temperature: float,
    seed: int,
    step: int,
    row_id: int,
) -> None:
    logits = torch.tensor([row], device=DEVICE)
    ids = torch.tensor([row_id], device=DEVICE)
    sampled = triton_sample(
        logits,
        ids,
        temperature=temperature,
        seed=seed,
        step=step,
        entropy_temperature=entropy_temperature,
    )
    exact = reference.sample_tokens(
        logits.double(), temperature, seed, step, ids, None, entropy_temperature
    )
    assert torch.equal(sampled.token, exact.token)
    for name in ("log_prob", "confidence", "entropy"):
        value, truth = getattr(sampled, name).double(), getattr(exact, name)
        torch.testing.assert_close(value, truth, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"row_ids": torch.arange(3).int()}, TypeError, "row_ids must be int64"),
        ({"row_ids": torch.arange(4)}, ValueError, "row_ids"),
        ({"step": -1}, ValueError, "step"),
        ({"step": 2**32}, ValueError, "step"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"entropy_temperature": 0.0}, ValueError, "temperature"),
        ({"banned_token": 5}, ValueError, "banned_token"),
        ({"logits": torch.zeros(3, 5).double()}, UnavailableBackendError, "float64"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, error: type[Exception], match: str) -> None:
    arguments = {"logits": torch.zeros(3, 5), "row_ids": torch.arange(3), **kwargs}
    with pytest.raises(error, match=match):
        triton_sample(arguments.pop("logits"), arguments.pop("row_ids"), **arguments)
