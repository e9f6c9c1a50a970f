"""The Triton row statistics: in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from egspo_kernels import (
    TokenStats,
    UnavailableBackendError,
    available_backends,
    last_backend,
    reference,
    sample_tokens,
    token_stats,
)
from egspo_kernels.dispatch.backend import ENVIRONMENT_VARIABLE
from tests.helpers.marks import slow

pytest.importorskip("triton")
# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan


def logits_of(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 131 + vocab)
    return (4 * torch.randn(rows, vocab, generator=generator)).to(dtype).to(DEVICE)


def triton_stats(logits: Tensor, targets: Tensor | None, **kwargs: object) -> TokenStats:
    stats = token_stats(logits, targets, backend="triton", **kwargs)
    assert last_backend("token_stats") == "triton"
    return stats


def eager(logits: Tensor, targets: Tensor, temperature: float, banned: int | None) -> TokenStats:
    """What one writes in PyTorch."""
    scores = logits / temperature
    if banned is not None:
        scores[:, banned] = -INF
    log_probs = scores.log_softmax(-1)
    confidence, argmax = log_probs.exp().max(-1)
    entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)
    picked = log_probs.gather(1, targets[:, None])[:, 0]
    return TokenStats(scores.logsumexp(-1), entropy, picked, argmax, confidence)


def assert_same(left: TokenStats, right: TokenStats) -> None:
    """Bitwise, NaN equal to NaN."""
    for name in TokenStats._fields:
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None and b is None) or a.numpy(force=True).tobytes() == b.numpy(
            force=True
        ).tobytes(), name


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [
        *itertools.product((7,), (1, 1000, 4097), FLOATS),
        (0, 2, torch.float32),
        (300, 2, torch.bfloat16),
        *slow(itertools.product((0, 1), (1, 2, 1000, 4097), FLOATS)),
        *slow(itertools.product((7,), (2,), FLOATS)),
        *slow(itertools.product((1, 7), (32000, 126464), FLOATS)),
        *slow([(1, 20001, torch.bfloat16)]),
    ],
)
@pytest.mark.slow
def test_error_is_that_of_eager(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits = logits_of(rows, vocab, dtype)
    targets = torch.arange(rows, device=DEVICE) * 37 % vocab
    temperature, banned = (1.0, None) if vocab == 1 else (0.7, vocab // 3)
    stats = triton_stats(logits, targets, temperature=temperature, banned_token=banned)
    exact = reference.token_stats(logits.double(), targets, temperature, banned)
    baseline = eager(logits, targets, temperature, banned)
    assert torch.equal(stats.argmax, exact.argmax) and stats.argmax.dtype == torch.int64
    assert stats.log_prob is not None and exact.log_prob is not None
    if banned is not None:
        assert bool((stats.log_prob[targets == banned] == -INF).all())
    for name in ("logsumexp", "entropy", "log_prob", "confidence"):
        value, truth, plain = (getattr(s, name) for s in (stats, exact, baseline))
        assert value.shape == (rows,) and value.dtype == torch.float32
        error = (value.double() - truth).nan_to_num(0).abs()
        allowed = (plain.double() - truth).nan_to_num(0).abs().amax() if rows else 0
        assert bool((error <= 2 * allowed + 2e-6).all()), name
    # Entropy chooses steps: its error is bounded whatever that of PyTorch.
    assert bool(((stats.entropy.double() - exact.entropy).abs() <= 2e-6).all())


SPECIAL_ROWS = [
    [-INF, 0.0, -INF],
    [2.0, 2.0, 2.0],
    [1.0, 3.0, 3.0],
    [-3e38, 3e38, -INF],
    [-INF, -INF, -INF],
    [0.0, NAN, 0.0],
    [NAN, NAN, NAN],
    [INF, 0.0, 0.0],
]


@pytest.mark.parametrize("padding", [0, 5000])
def test_special_rows(padding: int) -> None:
    """Also with the second block of a row all -inf."""
    logits = torch.nn.functional.pad(torch.tensor(SPECIAL_ROWS), (0, padding), value=-INF)
    targets = torch.tensor([0, 1, 1, 0, 1, 0, 1, 2])
    stats = triton_stats(logits.to(DEVICE), targets.to(DEVICE))
    expected = reference.token_stats(logits, targets, 1.0, None)
    assert stats.argmax[:5].tolist() == [1, 0, 1, 1, 0]
    assert bool(((stats.argmax >= 0) & (stats.argmax < logits.shape[1])).all())
    for name in ("entropy", "log_prob", "confidence"):
        value, truth = getattr(stats, name).cpu(), getattr(expected, name)
        torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert bool(stats.entropy[4:].isnan().all())
    torch.testing.assert_close(stats.logsumexp[:5].cpu(), expected.logsumexp[:5])
    assert not bool(stats.logsumexp[5:].isfinite().any())


def test_ties_go_to_the_lowest_id_across_blocks() -> None:
    logits = torch.zeros(3, 9000, device=DEVICE)
    logits[1, [8500, 4500, 4096]] = 1.0
    assert triton_stats(logits, None).argmax.tolist() == [0, 4096, 0]
    assert triton_stats(logits, None, banned_token=4096).argmax.tolist() == [0, 4500, 0]


def test_banned_token_is_left_out() -> None:
    logits = logits_of(3, 5000)
    logits[:, 4321] = torch.tensor([50.0, NAN, INF])
    targets = torch.full((3,), 4321, device=DEVICE)
    stats = triton_stats(logits, targets, banned_token=4321)
    without = logits.clone()
    without[:, 4321] = -INF
    # Infinite logits take another path, to the same numbers but for rounding.
    for value, expected in zip(stats, triton_stats(without, targets), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert bool((stats.log_prob == -INF).all())


@pytest.mark.slow
def test_a_row_is_bitwise_independent_of_its_batch() -> None:
    logits = logits_of(7, 10001, torch.bfloat16)
    targets = torch.arange(7, device=DEVICE)
    whole = triton_stats(logits, targets)
    assert_same(whole, triton_stats(logits, targets))
    for i in (0, 6):
        alone = triton_stats(logits[i : i + 1], targets[i : i + 1])
        assert_same(alone, TokenStats(*(value[i : i + 1] for value in whole)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_by_index(dtype: torch.dtype) -> None:
    logits = logits_of(6, 4100)
    index = torch.tensor([5, 0, 0, 3], device=DEVICE)
    targets = torch.tensor([1, 2, 3, 4099], device=DEVICE, dtype=dtype)
    picked = triton_stats(logits, targets, rows=index.to(dtype))
    assert_same(picked, triton_stats(logits[index], targets))
    strided = index.repeat_interleave(2)[::2]
    assert_same(picked, triton_stats(logits, targets, rows=strided))
    assert triton_stats(logits, None, rows=index[:0]).entropy.shape == (0,)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_strides(temperature: float) -> None:
    """Padded rows, an odd row stride, a broken alignment, repeated rows, strided columns."""
    logits = logits_of(5, 4200)
    rows = torch.tensor([4, 1], device=DEVICE)
    expected = triton_stats(logits, None, temperature=temperature)
    few = triton_stats(logits, None, temperature=temperature, rows=rows)
    for pad_left, pad_right in [(0, 24), (0, 1), (3, 4)]:
        buffer = torch.nn.functional.pad(logits, (pad_left, pad_right), value=99.0)
        view = buffer[:, pad_left : pad_left + 4200]
        assert_same(triton_stats(view, None, temperature=temperature), expected)
    for view in (logits.repeat_interleave(3, 1)[:, ::3], logits.t().contiguous().t()):
        assert view.stride(1) != 1
        assert_same(triton_stats(view, None, temperature=temperature), expected)
        assert_same(triton_stats(view, None, temperature=temperature, rows=rows), few)
    repeated = triton_stats(logits[2:3].expand(3, -1), None, temperature=temperature)
    for name in ("logsumexp", "entropy", "argmax", "confidence"):
        assert set(getattr(repeated, name).tolist()) == {float(getattr(expected, name)[2])}


def test_indices_out_of_range_read_nothing() -> None:
    """Where they are not checked, as on a GPU, they give NaN."""
    from egspo_kernels.triton_kernels import rows as kernels

    logits = logits_of(4, 600)[1:3]  # there is memory on both sides
    index = torch.tensor([-1, 0, 1, 2, 0, 1], device=DEVICE)
    targets = torch.tensor([0, -1, 0, 0, 600, 599], device=DEVICE)
    stats = kernels.token_stats(logits, targets, index, 1.0, None)
    assert stats.log_prob is not None
    assert stats.log_prob.isnan().tolist() == [True, True, False, True, True, False]
    assert stats.entropy.isnan().tolist() == [True, False, False, True, False, False]


def test_rounding_leaves_no_entropy_below_zero() -> None:
    """The largest weight is not 1 where its exponent is the rest of a rounded product."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 6e4]], device=DEVICE)
    for temperature in (11.8125, 0.3, 7.7):
        stats = triton_stats(logits, None, temperature=temperature)
        sampled = sample_tokens(
            logits,
            temperature=1.0,
            seed=0,
            step=0,
            row_ids=torch.zeros(1, dtype=torch.int64, device=DEVICE),
            entropy_temperature=temperature,
            backend="triton",
        )
        for entropy in (stats.entropy, sampled.entropy):
            assert 0.0 <= float(entropy) <= 2e-6


values = st.one_of(
    st.floats(-30, 30, width=16), st.sampled_from([0.0, 1.0, -INF, -6e4, 6e4, 2.0**-14])
)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    matrix=st.integers(1, 40).flatmap(
        lambda vocab: st.lists(
            st.lists(values, min_size=vocab, max_size=vocab), min_size=1, max_size=3
        )
    ),
    dtype=st.sampled_from(FLOATS),
    temperature=st.floats(0.05, 20),
    data=st.data(),
)
def test_any_values(
    matrix: list[list[float]], dtype: torch.dtype, temperature: float, data: st.DataObject
) -> None:
    logits = torch.tensor(matrix, dtype=dtype, device=DEVICE)
    vocab = logits.shape[1]
    banned = data.draw(st.none() | st.integers(0, vocab - 1)) if vocab > 1 else None
    targets = torch.tensor([data.draw(st.integers(0, vocab - 1)) for _ in matrix], device=DEVICE)
    stats = triton_stats(logits, targets, temperature=temperature, banned_token=banned)
    exact = reference.token_stats(logits.double(), targets, temperature, banned)
    # Tempered logits reach 1.2e6 here: rounding them to float32 alone moves what depends on them.
    largest = logits.double().nan_to_num(0, 0, 0).abs().max() / temperature
    scale = 1e-6 + 4e-7 * float(largest)
    for name in ("logsumexp", "entropy", "log_prob", "confidence"):
        value, truth = getattr(stats, name).double(), getattr(exact, name)
        torch.testing.assert_close(value, truth, rtol=2e-6, atol=scale, equal_nan=True)
    assert torch.equal(stats.argmax, exact.argmax)
    assert bool((stats.entropy.nan_to_num(0) >= 0).all())


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU Triton is the automatic choice")
def test_the_interpreter_runs_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(2, 10)
    token_stats(logits, None)
    assert last_backend("token_stats") in ("cpp", "reference")
    assert list(available_backends()["token_stats"])[-1] == "triton"
    assert next(iter(available_backends("cuda")["token_stats"])) == "triton"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "token_stats=triton")
    token_stats(logits, None)
    assert last_backend("token_stats") == "triton"
    with pytest.raises(UnavailableBackendError, match=ENVIRONMENT_VARIABLE):
        token_stats(logits.double(), None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("egspo_kernels.stats._TOKEN_STATS._chosen", {})
    with pytest.raises(UnavailableBackendError, match=r"needs a GPU.*available: .*reference"):
        token_stats(logits, None, backend="triton")


def test_float64_is_left_to_the_reference() -> None:
    logits = logits_of(2, 10).double()
    assert token_stats(logits, None).entropy.dtype == torch.float64
    assert last_backend("token_stats") == "reference"
    with pytest.raises(UnavailableBackendError, match="float64"):
        token_stats(logits, None, backend="triton")


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """Rows of LLaDA's vocabulary that start beyond 2**31 and 2**32 elements (17 GB)."""
    vocab, last = 126464, 2**33 // 126464 // 2 + 40
    logits = torch.empty(last + 1, vocab, dtype=torch.bfloat16, device="cuda")
    rows = torch.tensor([0, 2**31 // vocab + 1, last], device="cuda")
    logits[rows] = logits_of(3, vocab, torch.bfloat16)
    targets = torch.tensor([5, 6, vocab - 1], device="cuda")
    picked = triton_stats(logits, targets, rows=rows)
    assert_same(picked, triton_stats(logits[rows].clone(), targets))
    assert last * vocab > 2**32
    by_stride = logits[:: int(rows[1])]  # a row stride beyond 32 bits of bytes
    assert_same(
        triton_stats(by_stride[:2], targets[:2]), TokenStats(*(value[:2] for value in picked))
    )
