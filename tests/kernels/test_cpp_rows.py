"""The compiled CPU kernels against float64, and their independence of batch and threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from egspo_kernels import last_backend, sample_tokens, stepwise_surrogate, token_stats
from egspo_kernels.dispatch import extension

pytestmark = pytest.mark.skipif(
    isinstance(extension.cpu_library(), str), reason="the C++ library was not built"
)

INF, NAN = math.inf, math.nan
# Within and beyond one vector, one block of 1024 columns, one segment of 4096; LLaDA's vocabulary.
VOCABULARIES = [1, 2, 17, 1000, 1025, 4097, 32000, 126464]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIELDS = ("logsumexp", "entropy", "log_prob", "confidence")


def logits_of(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + rows * 131 + vocab)
    return (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_are_no_further_off_than_the_reference(
    vocab: int, dtype: torch.dtype, temperature: float
) -> None:
    logits, targets = logits_of(3, vocab, dtype), torch.tensor([0, vocab // 2, vocab - 1])
    banned = vocab // 3 if vocab > 1 else None
    options = {"temperature": temperature, "banned_token": banned}
    exact = token_stats(logits.double(), targets, **options, backend="reference")
    plain = token_stats(logits, targets, **options, backend="reference")
    found = token_stats(logits, targets, **options)
    assert last_backend("token_stats") == "cpp"
    assert torch.equal(found.argmax, exact.argmax)
    for name in FIELDS:
        right, value = getattr(exact, name), getattr(found, name).double()
        finite = right.isfinite()
        assert torch.equal(value[~finite], right[~finite])
        scale = right[finite].abs().clamp(min=1)
        error = ((value - right)[finite].abs() / scale).max() if finite.any() else 0
        other = ((getattr(plain, name) - right)[finite].abs() / scale).max() if finite.any() else 0
        assert error <= 2 * other + 3e-7, name  # 3e-7: two to three roundings of float32


SPECIAL = [
    [0.0, -INF, 3.0, -INF],
    [-INF, 0.0, -INF, -INF],
    [2.0, 2.0, 2.0, 2.0],
    [-INF, -INF, -INF, -INF],
    [0.0, NAN, 0.0, 1.0],
    [0.0, INF, 0.0, 1.0],
    [1e4, 1e4 - 1, -1e4, 0.0],
]


@pytest.mark.parametrize("banned", [None, 0, 3])
@pytest.mark.parametrize("width", [4, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows_as_the_reference_has_them(
    banned: int | None, width: int, dtype: torch.dtype
) -> None:
    logits = torch.full((len(SPECIAL), width), -INF, dtype=dtype)
    logits[:, :4] = torch.tensor(SPECIAL).to(dtype)
    targets = torch.tensor([0, 1, 2, 3, 0, 0, 1])
    ids = torch.arange(len(SPECIAL))
    expected = token_stats(logits, targets, banned_token=banned, backend="reference")
    found = token_stats(logits, targets, banned_token=banned, backend="cpp")
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), equal_nan=True, rtol=1e-6, atol=1e-6
        )
    numbers = ~expected.entropy.isnan()
    assert torch.equal(found.argmax[numbers], expected.argmax[numbers])
    assert bool(((found.argmax >= 0) & (found.argmax < width)).all())
    for temperature in (0.0, 1.0, 0.5):
        options = {"temperature": temperature, "seed": 1, "step": 2, "row_ids": ids}
        right = sample_tokens(logits, **options, banned_token=banned, backend="reference")
        drawn = sample_tokens(logits, **options, banned_token=banned, backend="cpp")
        assert torch.equal(drawn.token[numbers], right.token[numbers])
        assert bool(((drawn.token >= 0) & (drawn.token < width)).all())
        for value, other in zip(drawn[1:], right[1:], strict=True):
            torch.testing.assert_close(value, other, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_rounding_leaves_no_entropy_below_zero() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 6e4]])
    options = {"temperature": 1.0, "seed": 0, "step": 0, "row_ids": torch.zeros(1).long()}
    for temperature in torch.linspace(0.1, 20, 100).tolist():
        stats = token_stats(logits, None, temperature=temperature, backend="cpp")
        sample = sample_tokens(logits, **options, entropy_temperature=temperature, backend="cpp")
        for entropy in (stats.entropy, sample.entropy):
            assert 0.0 <= float(entropy) <= 2e-6


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
@pytest.mark.parametrize("entropy_temperature", [1.0, 0.6, 1.5])
def test_samples_are_those_of_the_reference(
    vocab: int, dtype: torch.dtype, temperature: float, entropy_temperature: float
) -> None:
    logits = logits_of(4, vocab, dtype, seed=3)
    options = {
        "temperature": temperature,
        "seed": -5,
        "step": 2**32 - 1,
        "row_ids": torch.tensor([5, 2**40 + 1, -3, 0]),
        "banned_token": vocab // 3 if vocab > 1 else None,
        "entropy_temperature": entropy_temperature,
    }
    expected = sample_tokens(logits, **options, backend="reference")
    found = sample_tokens(logits, **options)
    assert last_backend("sample_tokens") == "cpp"
    assert torch.equal(found.token, expected.token)
    for value, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(value, other, rtol=3e-6, atol=5e-6)


@pytest.mark.parametrize("vocab", [7, 1500, 126464])
def test_a_row_depends_neither_on_the_batch_nor_on_threads(
    vocab: int, threads: Callable[[int], None]
) -> None:
    logits, targets = logits_of(9, vocab, torch.bfloat16), torch.arange(9) % vocab
    ids = torch.arange(40, 49)
    threads(1)
    stats = token_stats(logits, targets)
    drawn = sample_tokens(logits, temperature=0.8, seed=0, step=1, row_ids=ids)
    gradient = gradient_of(logits, targets)
    threads(4)
    assert equal(token_stats(logits, targets), stats)
    assert equal(sample_tokens(logits, temperature=0.8, seed=0, step=1, row_ids=ids), drawn)
    assert torch.equal(gradient_of(logits, targets), gradient)
    for i in (0, 4, 8):
        row = slice(i, i + 1)
        # A copy that starts at another address modulo the width of a vector.
        moved = torch.empty(vocab + 3, dtype=torch.bfloat16)[3:].copy_(logits[i])[None]
        for alone in (logits[row], moved):
            assert equal(token_stats(alone, targets[row]), [x[row] for x in stats])
            one = sample_tokens(alone, temperature=0.8, seed=0, step=1, row_ids=ids[row])
            assert equal(one, [x[row] for x in drawn])
    picked = torch.tensor([8, 0, 0])
    some = token_stats(logits, targets[picked], rows=picked)
    assert equal(some, [x[picked] for x in stats])


def equal(found: tuple | list, expected: tuple | list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def gradient_of(logits: Tensor, targets: Tensor, **options: object) -> Tensor:
    leaf = logits.clone().requires_grad_()
    surrogate_of(leaf, targets, **options).backward()
    assert leaf.grad is not None
    return leaf.grad


def surrogate_of(logits: Tensor, targets: Tensor, **options: object) -> Tensor:
    rows = len(targets)
    steps = torch.arange(rows) // 2
    count = int(steps[-1]) + 1
    advantage = torch.linspace(-1, 2, count).to(logits.device)
    chosen = {"backend": "cpp", "clip_low": 0.2, "clip_high": 0.2, **options}
    old = torch.full((count,), -18.0)
    return stepwise_surrogate(logits, targets, steps, old, advantage, **chosen).loss  # type: ignore[arg-type]


@pytest.mark.parametrize("vocab", [1, 30, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kl", [None, "k3", "exact"])
@pytest.mark.parametrize("ref_dtype", [torch.float32, torch.bfloat16])
def test_gradients(vocab: int, dtype: torch.dtype, kl: str | None, ref_dtype: torch.dtype) -> None:
    logits, targets = logits_of(6, vocab, dtype), torch.arange(6) * 7 % vocab
    reference = logits + 0.25 * logits_of(6, vocab, torch.float32, seed=1)
    reference = reference.to(ref_dtype)
    options = {"beta": 0.3, "kl": kl, "ref_logits": reference} if kl else {}
    options |= {"temperature": 0.8, "banned_token": 3 if vocab > 4 else None, "clip_high": 1e6}
    exact_options = {**options, "backend": "reference"}
    if kl:
        exact_options["ref_logits"] = reference.double()
    exact = gradient_of(logits.double(), targets, **exact_options)
    plain = gradient_of(logits, targets, **options, backend="reference")
    found = gradient_of(logits, targets, **options)
    assert found.dtype == dtype
    scale = exact.abs().max().clamp(min=1e-6)  # of a vocabulary of one it is 0
    error, other = ((g.double() - exact).abs().max() / scale for g in (found, plain))
    # A step's ratio has the relative error of the sum of its log-probabilities, float32 near -20.
    assert error <= 2 * other + 1e-5


def test_exact_kl_where_probability_underflows() -> None:
    """The policy's probability is 0 in float32 and the reference's exactly: nothing is added."""
    logits = torch.tensor([[0.0, 1.0, -200.0]])
    reference = torch.tensor([[0.5, 0.5, -INF]])
    for backend in ("cpp", "reference"):
        leaf = logits.clone().requires_grad_()
        loss = surrogate_of(
            leaf, torch.tensor([0]), kl="exact", beta=1.0, ref_logits=reference, backend=backend
        )
        loss.backward()
        assert bool(loss.isfinite()) and leaf.grad is not None
        assert bool(leaf.grad.isfinite().all()) and leaf.grad[0, 2] == 0
    # Where the policy has some, the divergence is infinite.
    logits[0, 2] = 0.0
    for backend in ("cpp", "reference"):
        options = {"kl": "exact", "beta": 1.0, "ref_logits": reference, "backend": backend}
        assert surrogate_of(logits, torch.tensor([0]), **options) == INF


def test_gradient_in_the_memory_of_the_logits() -> None:
    logits, targets = logits_of(6, 300, torch.bfloat16), torch.arange(6)
    expected = gradient_of(logits, targets)
    leaf = logits.clone().requires_grad_()
    made = leaf * 1
    address = made.data_ptr()
    surrogate_of(made, targets, overwrite_logits=True).backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, expected)
    assert made.data_ptr() == address and torch.equal(made.detach(), expected)


def test_differentiable_once() -> None:
    leaf = logits_of(2, 10, torch.float32).requires_grad_()
    loss = surrogate_of(leaf, torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_columns_that_are_not_consecutive() -> None:
    logits, targets = logits_of(4, 200, torch.float32), torch.arange(4)
    strided = torch.empty(4, 400)[:, ::2].copy_(logits)
    across = logits.t().contiguous().t()
    expected = token_stats(logits, targets)
    for view in (strided, across, logits.expand(4, 200)):
        assert equal(token_stats(view, targets), expected)
        assert torch.equal(gradient_of(view, targets), gradient_of(logits, targets))
    row = logits[:1].expand(3, -1)
    assert equal(token_stats(row, targets[:3] * 0), [x[:1].expand(3) for x in expected])
