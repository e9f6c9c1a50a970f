"""The baseline of the iteration benchmark does what egspo does: tokens, steps, loss, gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.iteration.__main__ import main
from benchmarks.iteration.baseline import Baseline
from benchmarks.iteration.decoders import DECODERS
from benchmarks.iteration.measure import (
    ALGORITHMS,
    IMPLEMENTATIONS,
    PHASES,
    Algorithm,
    Bench,
    Implementation,
    flops_at,
    passes_of,
)
from benchmarks.iteration.problem import SIZES, changed
from benchmarks.meter import LiveBytes, Meter
from egspo.engines.optimization import build_optimizer
from egspo.engines.reduction import merge

SHORT = {"new_tokens": 8, "steps": 4, "block_length": 8}
PROBLEM = replace(SIZES["tiny"], prompts=2, micro_batch=5, rollout_batch=5, lora_rank=4)


def trained_bench(problem: Any = PROBLEM) -> Bench:
    """With an adapter that does something: a new one gives the reference policy and no gradient."""
    bench = Bench(problem)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in bench.denoiser.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return bench


def gradients_of(bench: Bench) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """A place for the gradients, and the function that puts them there before a step."""
    kept: dict[str, Tensor] = {}

    def keep() -> None:
        assert not kept, "one optimizer step"
        for name, parameter in bench.denoiser.model.named_parameters():
            if parameter.grad is not None:
                kept[name] = parameter.grad.clone()

    return kept, keep


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("follows", [False, True])
def test_same_tokens_selected_steps_loss_and_gradient(algorithm: Algorithm, follows: bool) -> None:
    """Also when it samples something else, and then follows egspo's trajectories."""
    bench = trained_bench()
    expected, keep = gradients_of(bench)
    ours = bench.egspo(algorithm, bench.meter("time"), keep)
    states, trajectory = ours.states, ours.states.trajectory

    found, keep = gradients_of(bench)
    config = bench.problem.config(stepwise=algorithm == "egspo-sa")
    config.seed = int(follows)
    optimizer = build_optimizer(bench.denoiser.model, config.optimizer)
    baseline = Baseline(config, bench.data, bench.denoiser, optimizer, keep)
    follow = (trajectory.tokens, trajectory.unmask_step, ours.selected()) if follows else None
    if follows:
        other = baseline.rollout().final[:, -bench.problem.new_tokens :]
        assert not torch.equal(other, trajectory.tokens)
    theirs = baseline.run(bench.meter("time"), follow)

    assert torch.equal(theirs.denoised.final[:, -bench.problem.new_tokens :], trajectory.tokens)
    assert torch.equal(theirs.selected, ours.selected())
    for step, canvas in enumerate(theirs.denoised.canvases):
        before = trajectory.canvas(torch.arange(8), torch.full((8,), step))
        assert torch.equal(canvas[:, -bench.problem.new_tokens :], before)

    place = states.row, states.rank
    assert len(states) == 32
    assert ours.scores.old_log_prob is None and ours.scores.ref_log_prob is not None
    theirs_ref = theirs.replayed.ref_log_prob[place].double()
    # float32 products of other shapes: some units in the last place of log-probabilities.
    torch.testing.assert_close(theirs_ref, ours.scores.ref_log_prob, rtol=1e-5, atol=1e-5)
    if algorithm == "egspo-sa":
        assert ours.scores.completions is not None
        assert torch.equal(theirs.replayed.completions[place], ours.scores.completions)
    torch.testing.assert_close(
        theirs.advantage[place], ours.advantage.float(), rtol=1e-5, atol=1e-6
    )
    assert expected.keys() == found.keys() and len(expected) == 2 * 2 * 7
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_same_loss() -> None:
    bench = trained_bench()
    config = bench.problem.config(stepwise=True)
    iteration = bench.egspo("egspo-sa", bench.meter("time"))
    iteration.phase.meter = bench.meter("time")
    loss = merge([iteration.run(1, [0, 1], 0)])["loss"]
    _, theirs = bench.baseline("egspo-sa", bench.meter("time"))
    assert config.algorithm.beta > 0 and abs(loss) > 1e-6
    assert theirs.loss == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_flops_from_passes_are_those_that_torch_counts(implementation: Implementation) -> None:
    sizes = {"d_model": 64, "layers": 4, "mlp": 192, "lora_rank": 2, "group_size": 2}
    problem = changed(SIZES["tiny"], {**sizes, **SHORT, "selected_steps": 2})
    counted = Bench(problem).run(implementation, "egspo-sa", "count")
    flops = flops_at(problem, implementation, passes_of(problem, implementation, "egspo-sa"))
    assert list(counted) == list(flops) == list(PHASES)
    for name, cost in counted.items():
        assert flops[name] == pytest.approx(cost.flops, rel=0.06 if name == "update" else 0.02)
        assert (cost.flops > 0) == (name != "select")


def test_memory_of_tensors_that_are_alive() -> None:
    before = torch.zeros(1000)
    meter = Meter(torch.device("cpu"), "count")
    with meter.running():
        with meter.phase("first"):
            kept = before + 1
            before.add_(1)  # was there before
            view = kept[:10]
            temporary = torch.ones(3000) * 2  # 24,000 bytes for a moment
            del temporary
        with meter.phase("second"):
            kept = kept * 2
            view = view + 1
    assert meter.phases["first"].peak_bytes == 4000 + 24000
    assert meter.phases["second"].peak_bytes == 4000 + 4000 + 40  # the view holds the first

    weight = torch.ones(100, requires_grad=True)
    with LiveBytes() as live:
        loss = (weight * weight).exp().sum()
        assert live.now == 400 + 4  # exp's result is kept for the gradient
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        assert live.now == 400 and live.peak > 800  # the gradient of the weight


def test_unknown_sizes_and_other_algorithms_are_refused() -> None:
    with pytest.raises(ValueError, match="no size 'width'"):
        changed(SIZES["tiny"], {"width": 3})
    with pytest.raises(ValueError, match="must divide evenly"):
        changed(SIZES["tiny"], {"steps": 7})
    bench = Bench(SIZES["tiny"])
    config = bench.problem.config(stepwise=True)
    config.generation.early_exit = True
    optimizer = build_optimizer(bench.denoiser.model, config.optimizer)
    with pytest.raises(ValueError, match=r"needs generation\.early_exit=False, got True"):
        Baseline(config, bench.data, bench.denoiser, optimizer)


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--size", "tiny", "--layers", "1"]
    for name, value in SHORT.items():
        sizes += ["--" + name.replace("_", "-"), str(value)]
    file = tmp_path / "results" / "iteration.json"
    main([*sizes, "--repeats", "1", "--algorithms", "egspo-sa", "--output", str(file)])
    record = json.loads(file.read_text())
    assert record["problem"]["steps"] == 4 and "--steps 4" in record["command"]
    assert record["cpu"] and record["versions"]["torch"]
    cells = {(row["implementation"], row["phase"]): row for row in record["rows"]}
    assert set(cells) == {(i, p) for i in IMPLEMENTATIONS for p in (*PHASES, "iteration")}
    for row in record["rows"]:
        assert row["seconds"] > 0 and row["peak_bytes"] > 0 and row["same_tokens"] == 1.0
    for name in IMPLEMENTATIONS:
        phases = [cells[name, phase] for phase in PHASES]
        assert cells[name, "iteration"]["flops"] == sum(row["flops"] for row in phases)
    printed = capsys.readouterr().out
    assert printed.count("| egspo-sa |") == len(PHASES) + 1 and "100.00 %" in printed

    main(["--flops-only", *sizes[1:], "--d-model", "32", "--algorithms", "egspo"])
    printed = capsys.readouterr().out
    assert "GFLOP, baseline" in printed and "seconds" not in printed


@pytest.mark.slow
def test_every_decoder_at_equal_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fewer columns a step computes the less it costs, in the same sizes."""
    file = tmp_path / "decoders.json"
    sizes = ["--size", "tiny", "--new-tokens", "32", "--steps", "32", "--block-length", "4"]
    main(["--decoders", *sizes, "--repeats", "1", "--algorithms", "egspo", "--output", str(file)])
    rows = json.loads(file.read_text())["rows"]
    flops = {(row["decoder"], row["phase"]): row["flops"] for row in rows}
    assert all(row["seconds"] > 0 for row in rows)
    for phase in ("rollout", "update"):
        full, dual, causal = (flops[name, phase] for name in DECODERS)
        assert full > dual > causal > 0, phase
    assert flops["full attention", "rollout"] > 5 * flops["block-causal", "rollout"]
    assert "| egspo | iteration |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--decoders", "--flops-only", "tiny"])
    assert "leave --flops-only out" in capsys.readouterr().err
