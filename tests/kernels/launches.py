"""Launches at LLaDA's vocabulary and others, on empty CPU tensors.

They are compiled, or stubbed, in processes of their own: importing this module makes the kernels,
for the interpreter or for a compiler. :mod:`tests.kernels.aot` names a launch by its source.
"""

from __future__ import annotations

from unittest import mock

import torch

from egspo_kernels.shared.objective import Objective, Steps
from egspo_kernels.triton_kernels import row_gradient, rows, sampling, surrogate

LLADA = 126464
bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32


def stats(n, vocab=LLADA, dtype=bf16, *, stride=None, skip=0, targets=False, picked=False,
          temperature=1.0, banned=None):  # fmt: skip
    logits = torch.empty(n, stride or vocab + skip, dtype=dtype)[:, skip : vocab + skip]
    index = torch.zeros(n, dtype=torch.int64)
    rows.token_stats(
        logits, index if targets else None, index if picked else None, temperature, banned
    )


def sample(n, vocab=LLADA, dtype=bf16, *, temperature=1.0, seed=0, step=0, banned=None,
           entropy_temperature=1.0):  # fmt: skip
    ids = torch.zeros(n, dtype=torch.int64)
    logits = torch.empty(n, vocab, dtype=dtype)
    sampling.sample_tokens(logits, temperature, seed, step, ids, banned, entropy_temperature)


def starved_sample():
    """With too few registers."""
    with mock.patch.object(sampling, "REGISTERS", 24):
        sample(2, 8001, temperature=0.5)


def stepwise(n, steps, kl, dtype=bf16, vocab=LLADA, *, stride=None, beta=0.3, aggregation="sum",
             temperature=0.9, banned=None, clips=(0.2, 0.3), skip=0):  # fmt: skip
    logits, ref_logits = (
        torch.empty(n, stride or vocab, dtype=dtype)[:, :vocab].requires_grad_() for _ in range(2)
    )
    index = torch.zeros(n + skip, dtype=torch.int64)[skip:]
    values = torch.zeros(3, steps)
    objective = Objective(*clips, beta if kl else 0.0, kl, aggregation)
    surrogate.stepwise_surrogate(
        logits, index, Steps(index, *values, None), ref_logits.detach() if kl else None,
        objective, temperature, banned, False,
    ).loss.backward()  # fmt: skip


def statistics_gradient(dtype=bf16, vocab=LLADA, stride=None):
    values = torch.zeros(2)
    row_gradient.row_gradient(
        torch.empty(2, stride or vocab, dtype=dtype)[:, :vocab],
        (values, values),
        row_gradient.Coefficients(values, values, values),
        1.0,
        None,
        targets=values.long(),
        entropy=values,
    )
