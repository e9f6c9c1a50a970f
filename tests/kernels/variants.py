"""Which launches are compiled for which GPU: once, for all tests that look at them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tests.kernels.aot import Compiled, Target, compiled

ARCHITECTURES = (80, 90, 100)
"""Of which the machine code is looked at."""

ROWS = (
    "stats(2)",
    "stats(2, dtype=f32, picked=True, targets=True)",
    "stats(2, dtype=f16)",
    "sample(2)",
    "sample(2, dtype=f32, temperature=0.5)",
    "sample(2, temperature=0.5, entropy_temperature=0.5)",
    "sample(2, temperature=0.5, entropy_temperature=0.7)",
    "sample(2, temperature=0.0)",
)
"""Every kind of launch of the statistics, at LLaDA's vocabulary."""
SURROGATES = tuple(
    f"stepwise(2, 2, {kl!r}, {dtype})" if kl != "statistics" else f"statistics_gradient({dtype})"
    for dtype in ("bf16", "f32")
    for kl in (None, "k3", "exact", "statistics")
)
"""Likewise of the surrogate."""
GATED = ("stats(2, targets=True)", "sample(2, temperature=0.5)")
"""What :mod:`tests.kernels.gate` has beside these."""

SAME_ROWS = (
    "stats(1)",
    "stats(16, temperature=0.3, banned=0)",
    "stats(17, temperature=1.5, banned=126336)",
    "stats(3, temperature=2.0, banned=1)",
    "stats(1, stride=LLADA + 16)",
    "stats(1, stride=2 * LLADA)",
    "sample(1, temperature=0.5)",
    "sample(16, temperature=0.7, seed=1, step=1, banned=1)",
    "sample(17, temperature=0.3, seed=2**63 - 1, step=2**32 - 1, banned=16)",
    "sample(2, temperature=0.9, seed=-(2**63), step=2**31, banned=126336)",
)
"""Launches of one variant of each kernel."""
SAME_SURROGATES = (
    "stepwise(1, 1, 'exact', temperature=1.0, clips=(0, 0), beta=1)",
    "stepwise(16, 16, 'exact', temperature=0.3, banned=0, clips=(0.2, 1), beta=0.1, skip=1)",
    "stepwise(17, 33, 'exact', temperature=1.5, banned=126336, clips=(1, 7.5), beta=1e-9, skip=2)",
    "stepwise(3, 1000, 'exact', temperature=2.0, banned=1, clips=(0.1, 0.2), beta=16, skip=3)",
    "stepwise(1, 1, 'exact', stride=LLADA + 16)",
)
WIDE_LOADS = {
    "stats(2, 8000)": 2,
    "stats(2, 8008)": 2,  # rows aligned to 16 bytes, not to 16 elements
    "stats(2, 8004)": 0,
    "stats(2, 8000, stride=8004)": 0,
    "stats(2, 8000, skip=1, stride=8016)": 0,  # the pointer is not aligned
}
"""How many loads of 16 bytes, by alignment."""
STARVED = "starved_sample()"
GRADIENTS = {
    "statistics_gradient(bf16, 8004)": ({"v2.32": 8}, 0),
    "statistics_gradient(bf16, 8001)": ({"16": 32}, 16),
    "statistics_gradient(bf16, 8000, 8001)": ({"v4.32": 4}, 16),
}
"""Stores by their width, and loads of single logits, by alignment."""

EVERY = (
    *(
        f"stats(2, {vocab}, {dtype}, targets=True, picked=True)"
        for dtype, vocab in itertools.product(("bf16", "f16", "f32"), ("LLADA", 8001))
    ),
    # Every pair of dtype, temperatures and alignment of the vocabulary.
    *(
        f"sample(2, {('LLADA', 8001)[(i + j) % 2]}, {dtype}, temperature={temperatures[0]}, "
        f"entropy_temperature={temperatures[1]})"
        for i, dtype in enumerate(("bf16", "f16", "f32"))
        for j, temperatures in enumerate(((1.0, 1.0), (0.5, 0.7), (0.5, 0.5), (0.0, 1.0)))
    ),
    *(
        f"stepwise(2, 2, {kl!r}, {dtype})"
        for dtype, kl in itertools.product(("bf16", "f16", "f32"), (None, "k3", "exact"))
    ),
    *(f"statistics_gradient({dtype})" for dtype in ("bf16", "f16", "f32")),
)

_HERE = (*ROWS, *SURROGATES)
_LAUNCHES: dict[Target, Sequence[str]] = {
    Target("cuda", 80): (*_HERE, *GATED),
    Target("cuda", 90): (
        *(*_HERE, *GATED, *SAME_ROWS, *SAME_SURROGATES, *WIDE_LOADS, STARVED, *GRADIENTS),
    ),
    Target("cuda", 100): (*_HERE, *EVERY),
    Target("cuda", 120): EVERY,
    Target("hip", "gfx942", 64): EVERY,
    Target("hip", "gfx1100"): EVERY,
}


def kernels(target: Target, launches: Sequence[str]) -> list[list[Compiled]]:
    """What each of these launches is compiled to."""
    found = compiled(list(dict.fromkeys(_LAUNCHES[target])), target)
    return [found[launch] for launch in launches]
