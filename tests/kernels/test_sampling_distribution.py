"""What is sampled, as a distribution: at LLaDA's vocabulary, over keys, and in the far tail.

Keys are fixed, so a test gives the same on every run. Limits of chi-square statistics are those of
one in a million.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from egspo_kernels import sample_tokens
from egspo_kernels.dispatch import extension
from egspo_kernels.random import BLOCK_COUNTERS, philox

HAS_LIBRARY = not isinstance(extension.cpu_library(), str)
library = pytest.mark.skipif(not HAS_LIBRARY, reason="the C++ library was not built")
BACKENDS = [pytest.param("cpp", marks=library), "reference"]
# The reference draws the same tokens (test_cpp_rows.py), in more time.
MANY = [BACKENDS[0], pytest.param("reference", marks=pytest.mark.slow)]
LLADA = 126464


def draw(
    logits: Tensor,
    row_ids: Tensor,
    backend: str,
    *,
    temperature: float = 1.0,
    seed: int = 11,
    step: int = 0,
) -> Tensor:
    """A token for each row id, of the same logits [V]."""
    rows = logits.expand(len(row_ids), -1)
    options = {"temperature": temperature, "seed": seed, "step": step, "row_ids": row_ids}
    return sample_tokens(rows, backend=backend, **options).token


def assert_chi_square(counts: Tensor, expected: Tensor, degrees: int) -> None:
    """By the cube root of Wilson and Hilferty, which is normal to three digits in the tail."""
    assert expected.min() >= 8, "cells too small for the test"
    statistic = float(((counts.double() - expected) ** 2 / expected).sum())
    spread = 2 / (9 * degrees)
    deviation = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    assert deviation < 4.75, (statistic, degrees)


def cells_of(probabilities: Tensor, least: float) -> Tensor:
    """[V] a cell for each token: its own if it is likely, else one shared with its neighbours."""
    likely = probabilities >= least
    whole = (torch.where(likely, 0.0, probabilities).cumsum(0) / (2 * least)).long()
    own = likely.cumsum(0) + whole.max()
    cells = torch.where(likely, own, whole)
    cells[~likely & (whole == whole.max())] = max(int(whole.max()) - 1, 0)  # the last is not full
    return cells.unique(return_inverse=True)[1]


@library
@pytest.mark.parametrize("temperature", [0.1, 0.3, 0.6, 1.0])
def test_frequencies_at_the_vocabulary_of_llada(temperature: float) -> None:
    generator = torch.Generator().manual_seed(int(100 * temperature))
    logits = (2 * torch.randn(LLADA, generator=generator)).bfloat16()
    probabilities = (logits.double() / temperature).softmax(0)
    count = 6000
    cells = cells_of(probabilities, 10 / count)
    expected = torch.zeros(int(cells.max()) + 1, dtype=torch.float64)
    expected.index_add_(0, cells, count * probabilities)
    assert len(expected) >= 5
    tokens = draw(logits, torch.arange(count), "cpp", temperature=temperature)
    counts = torch.bincount(cells[tokens], minlength=len(expected))
    assert_chi_square(counts, expected, len(expected) - 1)


@pytest.mark.parametrize("backend", MANY)
@pytest.mark.parametrize("apart", ["steps", "rows", "seeds", "high bits of rows"])
def test_draws_of_different_keys_are_independent(backend: str, apart: str) -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    logits, ids = probabilities.log().float(), torch.arange(20000 if backend == "cpp" else 4000)
    if apart == "rows":
        left, right = draw(logits, ids, backend).view(-1, 2).unbind(1)
    else:
        left = draw(logits, ids, backend)
        right = {
            "steps": lambda: draw(logits, ids, backend, step=1),
            "seeds": lambda: draw(logits, ids, backend, seed=12),
            "high bits of rows": lambda: draw(logits, ids + 2**32, backend),
        }[apart]()
    counts = torch.bincount(4 * left + right, minlength=16)
    assert_chi_square(counts, len(left) * torch.outer(probabilities, probabilities).flatten(), 15)


@pytest.mark.parametrize("backend", MANY)
def test_a_block_and_the_token_in_it_are_independent(backend: str) -> None:
    """128 blocks of equal tokens, 16 or 8 each: every pair of the two is as likely."""
    vocab, count = 2048 if backend == "cpp" else 1024, 40000 if backend == "cpp" else 10000
    ids = torch.arange(count)
    tokens = torch.cat([draw(torch.zeros(vocab), part, backend) for part in ids.chunk(20)])
    counts = torch.bincount(tokens, minlength=vocab)
    expected = torch.full((vocab,), count / vocab, dtype=torch.float64)
    assert_chi_square(counts, expected, vocab - 1)


RARE_BLOCKS = [246665850, 1201888658, 1530979260]
"""Row ids for which, with seed 7 and step 3, one of the first four blocks has a word below 4."""
RARE_TOKENS = [167957713, 670020355, 1257443282, 1499786657]
"""The same of the first four columns."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("row_id", "among"),
    [*((r, "blocks") for r in RARE_BLOCKS), *((r, "tokens") for r in RARE_TOKENS)],
)
def test_tails_are_drawn_as_the_words_say(backend: str, row_id: int, among: str) -> None:
    """A token of probability 1e-9 wins where its word is small enough, and there alone."""
    first = BLOCK_COUNTERS if among == "blocks" else 0
    counters = torch.tensor([first]), torch.tensor([row_id]), torch.tensor([0]), torch.tensor([3])
    words = philox(7, *counters)[0].double()
    noise = -torch.log1p(-(words + 0.5) * 2.0**-32)
    rare, other = int(words.argmin()), int(words.argmax())
    threshold = float(noise[rare] / noise[other])
    assert words[rare] < 4 and threshold < 1e-8
    apart = 8 if among == "blocks" else 1
    for factor, winner in ((1.01, rare), (0.99, other)):
        logits = torch.full((32,), -math.inf)
        logits[apart * other] = 0.0
        logits[apart * rare] = math.log(factor * threshold)
        token = draw(logits, torch.tensor([row_id]), backend, seed=7, step=3)
        assert token.item() == apart * winner


def test_resolution_is_what_is_stated() -> None:
    """Of a share p, the mean over all words of the chance that the others lose to it."""
    for p, short in ((1e-7, 1e-6), (1e-9, 0.00226), (1e-10, 0.2)):
        d = 2.0**-32 / p
        words = torch.arange(4 * int(40 / d) + 64, dtype=torch.float64)
        drawn = float((-(words + 0.5) * d).exp().sum()) * 2.0**-32
        stated = p * (d / 2) / math.sinh(d / 2)
        assert drawn == pytest.approx(stated, rel=1e-9)
        assert 1 - stated / p == pytest.approx(short, rel=0.05) or short < 1e-5
