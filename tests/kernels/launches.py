"""Launches at LLaDA's vocabulary and others, as scripts for :func:`tests.kernels.aot.compiled`."""

STATISTICS = """
import torch
from egspo_kernels.triton_kernels import rows, sampling

LLADA = 126464

def stats(n, vocab, dtype=torch.bfloat16, *, stride=None, skip=0, targets=False, picked=False,
          temperature=1.0, banned=None):
    logits = torch.empty(n, stride or vocab + skip, dtype=dtype)[:, skip : vocab + skip]
    index = torch.zeros(n, dtype=torch.int64)
    rows.token_stats(
        logits, index if targets else None, index if picked else None, temperature, banned
    )

def sample(n, vocab, dtype=torch.bfloat16, *, temperature=1.0, seed=0, step=0, banned=None,
           entropy_temperature=1.0):
    ids = torch.zeros(n, dtype=torch.int64)
    logits = torch.empty(n, vocab, dtype=dtype)
    sampling.sample_tokens(logits, temperature, seed, step, ids, banned, entropy_temperature)
"""

SURROGATE = """
import torch
from egspo_kernels.shared.objective import Objective, Steps
from egspo_kernels.triton_kernels import row_gradient, surrogate

LLADA = 126464

def stepwise(n, steps, kl, dtype=torch.bfloat16, *, stride=None, beta=0.3,
             aggregation="sum", temperature=0.9, banned=None, clips=(0.2, 0.3), skip=0):
    logits, ref_logits = (
        torch.empty(n, stride or LLADA, dtype=dtype)[:, :LLADA].requires_grad_() for _ in range(2)
    )
    index = torch.zeros(n + skip, dtype=torch.int64)[skip:]
    values = torch.zeros(3, steps)
    surrogate.stepwise_surrogate(
        logits, index, Steps(index, *values, None), ref_logits.detach() if kl else None,
        Objective(*clips, beta if kl else 0.0, kl, aggregation), temperature, banned, False,
    ).loss.backward()

def statistics_gradient(dtype, vocab=LLADA, stride=None):
    values = torch.zeros(2)
    row_gradient.row_gradient(
        torch.empty(2, stride or vocab, dtype=dtype)[:, :vocab], (values, values),
        row_gradient.Coefficients(values, values, values), 1.0, None,
        targets=values.long(), entropy=values,
    )
"""
