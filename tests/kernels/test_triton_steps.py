"""The Triton kernel from tokens to steps: in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from egspo_kernels.shared.objective import Objective, Steps, step_objective
from tests.kernels.surrogate_cases import DEVICE

kernels = pytest.importorskip("egspo_kernels.triton_kernels.steps")


@pytest.mark.parametrize("order", ["sorted", "reversed", "shuffled"])
def test_steps_find_their_tokens(order: str) -> None:
    """Two steps in three have no token, one has most; the kernel's blocks begin anywhere."""
    generator = torch.Generator().manual_seed(0)
    tokens, count = 3001, 70
    ids = 3 * torch.randint(count // 3, (tokens,), generator=generator)
    ids = torch.where(torch.rand(tokens, generator=generator) < 0.6, 30, ids)
    if order != "shuffled":
        ids = ids.sort(descending=order == "reversed").values
    log_prob, kl = -torch.rand(2, tokens, generator=generator)
    old, advantage = torch.randn(2, count, generator=generator)
    steps = Steps(ids, old, advantage, None, None)
    objective = Objective(0.2, 0.2, 0.1, "exact", "mean")
    on_device = Steps(*(None if each is None else each.to(DEVICE) for each in steps))
    surrogate, *_ = kernels.step_objective(objective, log_prob.to(DEVICE), kl.to(DEVICE), on_device)
    expected = step_objective(objective, log_prob.double(), steps, kl.double())
    for name in ("loss", "log_prob", "ratio", "kl"):
        value, truth = getattr(surrogate, name).cpu().double(), getattr(expected, name)
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)
