"""Reference statistics and sampling against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from egspo_kernels import (
    UnavailableBackendError,
    last_backend,
    linear_token_stats,
    sample_tokens,
    token_stats,
)

# One column; two; not a power of two; beyond one page; prime-ish; LLaDA's vocabulary.
VOCABULARIES = [1, 2, 1000, 4097, 126464]


def logits_of(
    rows: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 4.0
) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 131 + vocab)
    return (scale * torch.randn(rows, vocab, generator=generator)).to(dtype)


def oracle(logits: Tensor, targets: Tensor, temperature: float, banned: int | None) -> list[Tensor]:
    """Sums over the vocabulary in float64, a row at a time."""
    columns: list[list[float]] = []
    for row, target in zip(logits.double() / temperature, targets.tolist(), strict=True):
        keep = [v for v in range(len(row)) if v != banned]
        kept = row[keep]
        peak = kept.max()
        total = (kept - peak).exp().sum()
        logsumexp = peak + total.log()
        probs = (kept - logsumexp).exp()
        positive = probs > 0
        entropy = -(probs[positive] * (kept - logsumexp)[positive]).sum()
        log_prob = -math.inf if target == banned else float(row[target] - logsumexp)
        best = int(kept.argmax())
        columns.append([float(logsumexp), float(entropy), log_prob, keep[best], float(probs[best])])
    return list(torch.tensor(columns, dtype=torch.float64).t())


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_stats(vocab: int, dtype: torch.dtype, temperature: float) -> None:
    rows = 3
    logits = logits_of(rows, vocab, dtype)
    targets = torch.tensor([0, vocab // 2, vocab - 1])
    banned = vocab // 3 if vocab > 1 else None
    expected = oracle(logits, targets, temperature, banned)
    stats = token_stats(
        logits, targets, temperature=temperature, banned_token=banned, backend="reference"
    )
    assert last_backend("token_stats") == "reference"
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    for value, reference in zip(stats, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=tolerance, atol=tolerance)
    assert stats.argmax.dtype == torch.int64
    assert stats.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_token_stats_special_rows() -> None:
    inf = math.inf
    logits = torch.tensor(
        [[-inf, 0.0, -inf], [2.0, 2.0, 2.0], [-inf, -inf, -inf], [0.0, math.nan, 0.0]]
    )
    stats = token_stats(logits, torch.tensor([0, 1, 1, 0]))
    assert stats.entropy[0] == 0 and stats.log_prob is not None and stats.log_prob[0] == -inf
    assert float(stats.entropy[1]) == pytest.approx(math.log(3), abs=1e-6)
    assert stats.argmax[1] == 0 and float(stats.confidence[1]) == pytest.approx(1 / 3)
    assert stats.logsumexp[2] == -inf
    assert bool(stats.entropy[2:].isnan().all())


def test_token_stats_rows_strides_and_empty() -> None:
    logits = logits_of(7, 50)
    rows = torch.tensor([6, 0, 0, 3])
    picked = token_stats(logits, None, rows=rows)
    whole = token_stats(logits, None)
    assert picked.log_prob is None
    assert torch.equal(picked.entropy, whole.entropy[rows])
    strided = torch.empty(7, 100)[:, ::2].copy_(logits)
    assert torch.equal(token_stats(strided, None).entropy, whole.entropy)
    assert token_stats(logits[:0], torch.empty(0, dtype=torch.int64)).entropy.shape == (0,)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]])
    count, banned = 20000, 3
    sampled = sample_tokens(
        logits.expand(count, -1),
        temperature=temperature,
        seed=1,
        step=2,
        row_ids=torch.arange(count),
        banned_token=banned,
    )
    allowed = torch.tensor([0, 1, 2, 4])
    probs = (logits[0, allowed].double() / temperature).softmax(0)
    counts = torch.bincount(sampled.token, minlength=5).double()
    assert counts[banned] == 0
    statistic = float(((counts[allowed] - count * probs) ** 2 / (count * probs)).sum())
    assert statistic < 16.3  # chi-square with 3 degrees of freedom, one in a thousand
    index = torch.tensor([0, 1, 2, -1, 3])[sampled.token]
    torch.testing.assert_close(sampled.log_prob.double(), probs.log()[index], rtol=0, atol=1e-6)
    plain = logits[0, allowed].double().softmax(0)
    torch.testing.assert_close(sampled.confidence.double(), plain[index], rtol=0, atol=1e-6)
    entropy = -(plain * plain.log()).sum()
    torch.testing.assert_close(sampled.entropy.double(), entropy.expand(count), rtol=0, atol=1e-6)


def test_bf16_logits_do_not_coarsen_the_noise() -> None:
    """On flat logits the mean log-probability of the sample is -log V whatever the precision."""
    count, vocab = 64, 4096
    logits = torch.zeros(count, vocab, dtype=torch.bfloat16)
    sampled = sample_tokens(logits, temperature=1.0, seed=0, step=0, row_ids=torch.arange(count))
    torch.testing.assert_close(sampled.log_prob, torch.full((count,), -math.log(vocab)))
    assert len(set(sampled.token.tolist())) > count * 0.9


def test_greedy_and_batch_invariance() -> None:
    logits = logits_of(9, 40)
    greedy = sample_tokens(logits, temperature=0, seed=0, step=0, row_ids=torch.arange(9))
    assert torch.equal(greedy.token, logits.argmax(1)) and bool((greedy.log_prob == 0).all())
    ids = torch.arange(100, 109)
    whole = sample_tokens(logits, temperature=1.0, seed=0, step=4, row_ids=ids)
    for i in range(9):
        alone = sample_tokens(
            logits[i : i + 1], temperature=1.0, seed=0, step=4, row_ids=ids[i : i + 1]
        )
        assert all(torch.equal(a[0], w[i]) for a, w in zip(alone, whole, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_linear_token_stats(bias: bool) -> None:
    hidden, weight = torch.randn(11, 6).double(), torch.randn(23, 6).double()
    offset = torch.randn(23).double() if bias else None
    targets = torch.randint(23, (11,))
    expected = token_stats(
        torch.nn.functional.linear(hidden, weight, offset),
        targets,
        temperature=0.8,
        banned_token=4,
    )
    row_bytes = 6 * 8 * 23
    for rows in (1, 3, 100):
        stats = linear_token_stats(
            hidden,
            weight,
            targets,
            bias=offset,
            temperature=0.8,
            banned_token=4,
            workspace_bytes=rows * row_bytes,
        )
        for value, reference in zip(stats, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("output", ["log_prob", "entropy", "logsumexp"])
@pytest.mark.parametrize("banned", [None, 2])
def test_linear_token_stats_gradients(output: str, banned: int | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 3, 4])

    def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        stats = linear_token_stats(
            h,
            w,
            targets,
            bias=b,
            temperature=0.7,
            banned_token=banned,
            workspace_bytes=2 * 6 * 8 * 5,
        )
        return getattr(stats, output)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))
    with pytest.raises(RuntimeError, match="differentiable once"):
        (first,) = torch.autograd.grad(
            function(hidden, weight, bias).sum(), hidden, create_graph=True
        )
        torch.autograd.grad(first.sum(), hidden)


def test_linear_gradient_only_where_required() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(7, 4)
    linear_token_stats(hidden, weight, torch.tensor([0, 1, 2])).log_prob.sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_linear_under_autocast_repeats_the_forward_in_backward() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(7, 4)
    targets = torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        stats = linear_token_stats(hidden, weight, targets)
    expected = token_stats(hidden.bfloat16() @ weight.bfloat16().t(), targets)
    assert torch.equal(stats.log_prob, expected.log_prob)
    stats.log_prob.sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all())


LOGITS = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"logits": LOGITS[0]}, ValueError, "logits"),
        ({"logits": LOGITS.long()}, TypeError, "logits"),
        ({"logits": LOGITS[:, :0], "targets": None}, ValueError, "logits"),
        ({"targets": torch.tensor([0, 1])}, ValueError, "targets"),
        ({"targets": torch.tensor([0, 1, 5])}, ValueError, "targets"),
        ({"targets": torch.tensor([0, 1, -1])}, ValueError, "targets"),
        ({"targets": torch.zeros(3)}, TypeError, "targets"),
        ({"rows": torch.tensor([3])}, ValueError, "rows"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"banned_token": 5}, ValueError, "banned_token"),
        ({"banned_token": True}, TypeError, "banned_token must be an int, got True"),
        ({"banned_token": 1.0}, TypeError, "banned_token must be an int, got 1.0"),
        ({"temperature": True}, TypeError, "temperature must be a number, got True"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"logits": LOGITS[:, :1], "banned_token": 0}, ValueError, "banned_token"),
        ({"backend": "cutlass"}, ValueError, "backend"),
        ({"logits": LOGITS.double(), "backend": "triton"}, UnavailableBackendError, "float64"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, error: type[Exception], match: str) -> None:
    arguments = {"logits": LOGITS, "targets": torch.zeros(3, dtype=torch.int64), **kwargs}
    with pytest.raises(error, match=match):
        token_stats(arguments.pop("logits"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"weight": torch.zeros(5, 3)}, ValueError, "weight"),
        ({"weight": torch.zeros(5, 2).double()}, TypeError, "weight"),
        ({"bias": torch.zeros(4)}, ValueError, "bias"),
        ({"bias": torch.zeros(5).double()}, TypeError, "bias must have the dtype of hidden"),
        ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias is on meta"),
        ({"bias": [0.0] * 5}, TypeError, "bias must be a tensor"),
        ({"workspace_bytes": 10}, ValueError, "workspace_bytes"),
    ],
)
def test_bad_linear_arguments_are_named(kwargs: dict, error: type[Exception], match: str) -> None:
    arguments = {"weight": torch.zeros(5, 2), **kwargs}
    with pytest.raises(error, match=match):
        linear_token_stats(torch.zeros(3, 2), arguments.pop("weight"), None, **arguments)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"step": 1.5}, TypeError, "step must be an int, got 1.5"),
        ({"step": True}, TypeError, "step must be an int, got True"),
        ({"step": -1}, ValueError, "step"),
        ({"seed": 0.0}, TypeError, "seed must be an int, got 0.0"),
        ({"row_ids": torch.zeros(3)}, TypeError, "row_ids"),
        ({"entropy_temperature": 0.0}, ValueError, "entropy_temperature must be finite and > 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and >= 0"),
    ],
)
def test_bad_sampling_arguments_are_named(kwargs: dict, error: type[Exception], match: str) -> None:
    ids = torch.zeros(3, dtype=torch.int64)
    arguments = {"temperature": 1.0, "seed": 0, "step": 0, "row_ids": ids, **kwargs}
    with pytest.raises(error, match=match):
        sample_tokens(LOGITS, **arguments)
