"""The stepwise surrogate against its definition, a step at a time, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from egspo_kernels import (
    aggregate_steps,
    last_backend,
    linear_stepwise_surrogate,
    stepwise_surrogate,
)

TOKENS, VOCAB, STEPS, DIM = 9, 6, 4, 3
STEP_IDS = torch.tensor([2, 0, 0, 1, 2, 2, 0, 3, 3])
BANNED, TEMPERATURE, LOW, HIGH, BETA = 5, 0.8, 0.2, 0.3, 0.1


def problem(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(TOKENS, DIM), normal(VOCAB, DIM)
    targets = torch.randint(VOCAB - 1, (TOKENS,), generator=generator)
    scores = (hidden @ weight.t() / TEMPERATURE).index_fill(1, torch.tensor([BANNED]), -math.inf)
    token = scores.log_softmax(1).gather(1, targets[:, None])[:, 0]
    log_prob = torch.zeros(STEPS, dtype=torch.float64).index_add(0, STEP_IDS, token)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        # Ratios on both sides of both clips.
        "old_log_prob": log_prob + torch.tensor([0.5, -0.5, 0.05, -0.4]),
        "advantage": torch.tensor([-1.0, 2.0, 0.7, -0.3], dtype=torch.float64),
        "ref_hidden": hidden + 0.3 * normal(TOKENS, DIM),
        "weights": torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64),
    }


def definition(p: dict[str, Tensor], kl: str | None, aggregation: str) -> Tensor:
    """The loss, written out with loops."""

    def scores(hidden: Tensor) -> Tensor:
        logits = hidden @ p["weight"].t() / TEMPERATURE
        return logits.index_fill(1, torch.tensor([BANNED]), -math.inf).log_softmax(1)

    policy, reference = scores(p["hidden"]), scores(p["ref_hidden"])
    loss = torch.zeros((), dtype=torch.float64)
    for step in range(STEPS):
        rows = (step == STEP_IDS).nonzero()[:, 0].tolist()
        log_prob = sum(policy[i, p["targets"][i]] for i in rows)
        ref_log_prob = sum(reference[i, p["targets"][i]] for i in rows)
        if aggregation == "mean":
            log_prob, ref_log_prob = log_prob / len(rows), ref_log_prob / len(rows)
        ratio = (log_prob - p["old_log_prob"][step]).exp()
        advantage = p["advantage"][step]
        term = -torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
        if kl == "k3":
            term = term + BETA * ((ref_log_prob - log_prob).exp() - (ref_log_prob - log_prob) - 1)
        if kl == "exact":
            exact = sum(
                (policy[i, v].exp() * (policy[i, v] - reference[i, v]))
                for i in rows
                for v in range(VOCAB)
                if v != BANNED
            )
            term = term + BETA * (exact / len(rows) if aggregation == "mean" else exact)
        if aggregation == "sum":
            term = term / len(rows)
        loss = loss + p["weights"][step] * term
    return loss


def options(kl: str | None, aggregation: str) -> dict[str, Any]:
    return {
        "clip_low": LOW,
        "clip_high": HIGH,
        "beta": BETA if kl else 0.0,
        "kl": kl,
        "temperature": TEMPERATURE,
        "banned_token": BANNED,
        "aggregation": aggregation,
    }


@pytest.mark.parametrize("kl", [None, "k3", "exact"])
@pytest.mark.parametrize("aggregation", ["sum", "mean", "exact"])
@pytest.mark.parametrize("linear", [False, True])
def test_loss_and_gradient(kl: str | None, aggregation: str, linear: bool) -> None:
    p = problem()
    p["hidden"].requires_grad_()
    if aggregation == "mean":
        counts = torch.bincount(STEP_IDS, minlength=STEPS)
        p["old_log_prob"] = p["old_log_prob"] / counts
    expected = definition(p, kl, aggregation)
    (expected_gradient,) = torch.autograd.grad(expected, p["hidden"])
    extra: dict[str, Any] = {"weights": p["weights"]}
    steps = (p["targets"], STEP_IDS, p["old_log_prob"], p["advantage"])
    if linear:
        if kl:
            extra["ref_hidden"] = p["ref_hidden"]
        result = linear_stepwise_surrogate(
            p["hidden"],
            p["weight"],
            *steps,
            workspace_bytes=2 * 6 * 8 * VOCAB,
            **extra,
            **options(kl, aggregation),
        )
    else:
        if kl:
            extra["ref_logits"] = p["ref_hidden"] @ p["weight"].t()
        result = stepwise_surrogate(
            p["hidden"] @ p["weight"].t(), *steps, **extra, **options(kl, aggregation)
        )
    assert (
        last_backend("linear_stepwise_surrogate" if linear else "stepwise_surrogate") == "reference"
    )
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(result.loss, p["hidden"])
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    if aggregation != "mean":
        assert bool(result.clipped_low.any()) and bool(result.clipped_high.any())
    assert not bool((result.clipped_low & result.clipped_high).any())
    assert int(result.clamped) == 0


def test_gradcheck_through_the_exact_kl() -> None:
    p = problem(1)

    def function(hidden: Tensor) -> Tensor:
        return linear_stepwise_surrogate(
            hidden,
            p["weight"],
            p["targets"],
            STEP_IDS,
            p["old_log_prob"],
            p["advantage"],
            ref_hidden=p["ref_hidden"],
            **options("exact", "sum"),
        ).loss

    assert torch.autograd.gradcheck(function, (p["hidden"].requires_grad_(),))


def test_reference_log_prob_may_be_given() -> None:
    p = problem()
    steps = (p["targets"], STEP_IDS, p["old_log_prob"], p["advantage"])
    logits, ref_logits = p["hidden"] @ p["weight"].t(), p["ref_hidden"] @ p["weight"].t()
    scores = (ref_logits / TEMPERATURE).index_fill(1, torch.tensor([BANNED]), -math.inf)
    token = scores.log_softmax(1).gather(1, p["targets"][:, None])[:, 0]
    given = stepwise_surrogate(
        logits,
        *steps,
        ref_log_prob=aggregate_steps(token, STEP_IDS, STEPS, "sum"),
        **options("k3", "sum"),
    )
    made = stepwise_surrogate(logits, *steps, ref_logits=ref_logits, **options("k3", "sum"))
    torch.testing.assert_close(given.loss, made.loss, rtol=1e-12, atol=0)


def test_own_reference_head() -> None:
    p = problem()
    weight = p["weight"].clone().requires_grad_()
    steps = (p["targets"], STEP_IDS, p["old_log_prob"], p["advantage"])
    with pytest.raises(ValueError, match="ref_weight"):
        linear_stepwise_surrogate(
            p["hidden"], weight, *steps, ref_hidden=p["ref_hidden"], **options("exact", "sum")
        )
    result = linear_stepwise_surrogate(
        p["hidden"],
        weight,
        *steps,
        ref_hidden=p["hidden"],
        ref_weight=p["weight"],
        **options("exact", "sum"),
    )
    torch.testing.assert_close(result.kl, torch.zeros(STEPS, dtype=torch.float64))
    result.loss.backward()
    assert weight.grad is not None


def test_log_ratios_are_clamped_and_counted() -> None:
    p = problem()
    old = p["old_log_prob"].clone()
    old[1] -= 100.0
    logits = (p["hidden"] @ p["weight"].t()).requires_grad_()
    result = stepwise_surrogate(
        logits, p["targets"], STEP_IDS, old, p["advantage"] * 0 - 1, **options(None, "exact")
    )
    assert int(result.clamped) == 1
    assert float(result.ratio[1]) == pytest.approx(math.exp(20.0))
    assert bool(result.loss.isfinite())


def test_no_rows_and_steps_without_tokens() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    result = stepwise_surrogate(
        torch.empty(0, VOCAB, requires_grad=True),
        empty,
        empty,
        torch.zeros(2),
        torch.ones(2),
        **options(None, "sum"),
    )
    assert result.log_prob.tolist() == [0.0, 0.0]
    assert result.loss.item() == -1.0  # ratio 1 by definition: nothing was revealed
    result.loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"step_ids": STEP_IDS + 2}, ValueError, "step_ids"),
        ({"step_ids": STEP_IDS.double()}, TypeError, "step_ids"),
        ({"step_ids": STEP_IDS[:3]}, ValueError, "step_ids"),
        ({"targets": torch.full((TOKENS,), VOCAB)}, ValueError, "targets"),
        ({"old_log_prob": torch.zeros(STEPS, 1)}, ValueError, "old_log_prob"),
        ({"advantage": torch.zeros(STEPS + 1)}, ValueError, "advantage"),
        ({"advantage": torch.zeros(STEPS, requires_grad=True)}, ValueError, "advantage"),
        ({"weights": torch.zeros(2)}, ValueError, "weights"),
        ({"weights": torch.ones(STEPS, dtype=torch.int64)}, TypeError, "weights must be floating"),
        ({"beta": True}, TypeError, "beta must be a number, got True"),
        ({"clip_low": 1.5}, ValueError, "clip_low"),
        ({"clip_high": -0.1}, ValueError, "clip_high"),
        ({"beta": -1.0}, ValueError, "beta"),
        ({"beta": 0.1, "kl": None}, ValueError, "kl"),
        ({"kl": "k2"}, ValueError, "kl"),
        ({"kl": "k3"}, ValueError, "ref_log_prob"),
        ({"kl": "exact"}, ValueError, "ref_logits"),
        ({"ref_log_prob": torch.zeros(STEPS)}, ValueError, "kl"),
        ({"aggregation": "median"}, ValueError, "aggregation"),
        ({"temperature": 0.0}, ValueError, "temperature"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], match: str) -> None:
    arguments = {
        "targets": torch.zeros(TOKENS, dtype=torch.int64),
        "step_ids": STEP_IDS,
        "old_log_prob": torch.zeros(STEPS),
        "advantage": torch.zeros(STEPS),
        **options(None, "sum"),
        **change,
    }
    with pytest.raises(error, match=match):
        stepwise_surrogate(torch.zeros(TOKENS, VOCAB), **arguments)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", ["old_log_prob", "advantage"])
def test_nan_reaches_the_gradient(backend: str, name: str) -> None:
    """A loss that is NaN must not leave a gradient that looks like one."""
    logits = torch.zeros(TOKENS, VOCAB, requires_grad=True)
    values = {"old_log_prob": torch.full((STEPS,), -5.0), "advantage": torch.ones(STEPS)}
    values[name][0] = math.nan
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    result = stepwise_surrogate(
        logits, targets, STEP_IDS, **values, **options(None, "sum"), backend=backend
    )
    result.loss.backward()
    assert bool(result.loss.isnan()) and logits.grad is not None
    assert bool(logits.grad[STEP_IDS == 0].isnan().any(1).all())
