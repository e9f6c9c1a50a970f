"""Optimizers against their update written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from egspo.config import OptimizerConfig
from egspo.engines.optimization import apply_gradients, build_optimizer


def test_sgd_with_momentum_is_its_formula() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    model = nn.ParameterList([weight])
    config = OptimizerConfig(name="sgd", learning_rate=0.1, betas=(0.5, 0.99), weight_decay=0.0)
    optimizer = build_optimizer(model, config)
    gradients = [
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[-1.0, 4.0]]),
        torch.tensor([[0.0, 1.0]]),
    ]
    expected, velocity = weight.detach().clone(), torch.zeros(1, 2, dtype=torch.float64)
    for gradient in gradients:
        weight.grad = gradient.double()
        apply_gradients(optimizer)
        velocity = 0.5 * velocity + gradient
        expected = expected - 0.1 * velocity
        torch.testing.assert_close(weight.detach(), expected)
        assert weight.grad is None


def test_sgd_refuses_decoupled_weight_decay() -> None:
    with pytest.raises(ValueError, match=r"weight_decay \(0.1\) is decoupled, which sgd has not"):
        OptimizerConfig(name="sgd")
