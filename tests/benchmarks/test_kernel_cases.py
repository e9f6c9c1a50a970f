from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import egspo_kernels
from benchmarks.kernels import eager, peers
from benchmarks.kernels.cases import achieved, cases
from benchmarks.kernels.implementation import Implementation
from benchmarks.kernels.implementations import EVERY_FUNCTION, implementations
from benchmarks.kernels.workloads import (
    Workload,
    floor_seconds,
    make_inputs,
    work_of,
    workloads,
)
from benchmarks.result_files import read

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
H200 = {"bytes_per_second": 4.3e12, "flops_per_second": {"bfloat16": 790e12}}

TINY = [
    Workload("token_stats", 6, 50),
    Workload("sample_tokens", 6, 50),
    *(Workload("linear_token_stats", 6, 50, torch.float32, 8, backward=b) for b in (False, True)),
    *(
        Workload(function, 8, 50, torch.float32, dim, kl, backward)
        for function, dim in (("stepwise_surrogate", 0), ("linear_stepwise_surrogate", 8))
        for kl in (None, "k3", "exact")
        for backward in (False, True)
    ),
    Workload("select_steps", 4, 16, torch.float32, k=3),
    Workload("select_steps_segmented", 4, 16, torch.float32, k=3),
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_function_has_cases_with_their_own_names(device: str) -> None:
    suite = cases(device)
    names = [case.id for case in suite]
    assert len(set(names)) == len(names)
    for function in EVERY_FUNCTION:
        mine = [c.implementation.name for c in suite if c.workload.function == function]
        assert {"eager", "torch.compile"} <= set(mine) and any("egspo" in name for name in mine)
    dispatched = set(egspo_kernels.available_backends())
    several_ranks = {name for name in dispatched if name.startswith("vocab_parallel_")}
    assert set(EVERY_FUNCTION) == dispatched - several_ranks
    assert {w.backward for w in workloads(device) if w.function.startswith("linear")} == {0, 1}


@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.id)
def test_implementations_that_run_here_agree_with_float64(workload: Workload) -> None:
    ran = []
    for implementation in implementations("cpu"):
        if workload.function not in implementation.functions:
            continue
        if implementation.name == "torch.compile" or implementation.lacks(workload, CPU):
            continue  # compiled from eager, and seconds to compile
        inputs = make_inputs(workload, CPU)
        prepared = implementation.prepare(inputs)
        outputs = eager.run(implementation.build(workload), workload, prepared)
        outputs = implementation.restore(outputs)
        errors = eager.errors(workload, outputs, eager.truth(workload, inputs, outputs))
        assert errors, implementation.name
        bound = 0.1 if implementation.name in ("TRL", "Liger-Kernel") else 1e-4  # in bfloat16
        assert all(error < bound for error in errors.values()), (implementation.name, errors)
        assert ("gradient" in errors) == workload.backward
        ran.append(implementation.name)
    assert "egspo reference" in ran and "eager" in ran


def test_a_wrong_answer_has_an_error() -> None:
    workload = TINY[0]
    inputs = make_inputs(workload, CPU)
    right = eager.token_stats(inputs)
    wrong = {**right, "entropy": right["entropy"] + 0.5, "argmax": right["argmax"] + 1}
    errors = eager.errors(workload, wrong, eager.truth(workload, inputs, wrong))
    assert errors["entropy"] == pytest.approx(0.5, abs=1e-3) and errors["argmax"] == 1.0


@pytest.mark.parametrize(
    "implementation",
    [peer for peer in peers.PEERS if peer.name != "torch.topk"],
    ids=lambda peer: f"{peer.name} {peer.functions[0]}",
)
def test_a_peer_that_cannot_run_says_why(
    implementation: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload(implementation.functions[0], 8, 64)
    monkeypatch.setattr(peers, "version_of", lambda name: None)
    assert str(implementation.lacks(workload, torch.device("cuda"))).endswith("is not installed")


def test_limits_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "version_of", lambda name: "1.0")
    gpu = torch.device("cuda")

    def reason(name: str, workload: Workload) -> str | None:
        (peer,) = (p for p in peers.PEERS if p.name == name and workload.function in p.functions)
        return peer.lacks(workload, gpu)

    assert reason("Liger-Kernel", Workload("stepwise_surrogate", 8, 50)) is None
    assert "KL" in str(reason("Liger-Kernel", Workload("stepwise_surrogate", 8, 50, kl="k3")))
    assert "equal size" in str(reason("Liger-Kernel", Workload("stepwise_surrogate", 9, 50)))
    assert reason("QuACK", Workload("select_steps", 8, 256)) is None
    assert "powers of two" in str(reason("QuACK", Workload("select_steps", 8, 100)))


def test_layout_of_liger_has_one_more_row_per_step() -> None:
    workload = Workload("stepwise_surrogate", 8, 50, backward=True)
    inputs = make_inputs(workload, CPU)
    laid_out = peers._liger_layout(inputs)
    assert laid_out["logits"].shape == (2, 5, 50) and laid_out["logits"].requires_grad
    assert torch.equal(laid_out["logits"][:, :4].reshape(8, 50), inputs["logits"])
    assert laid_out["targets"].shape == laid_out["old_token_log_prob"].shape == (2, 4)
    restored = peers._liger_restore({"gradient": laid_out["logits"]})["gradient"]
    assert torch.equal(restored, inputs["logits"])


def test_the_interpreter_is_never_timed() -> None:
    (triton,) = (i for i in implementations("cpu") if i.name == "egspo triton")
    assert os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
    assert "interpreter" in str(triton.lacks(TINY[0], CPU))


@pytest.mark.parametrize(
    ("workload", "microseconds"),
    [  # the table of floors for LLaDA-8B's head on an H200
        (Workload("token_stats", 512, 126464), 30),
        (Workload("stepwise_surrogate", 128, 126464, kl="exact"), 15),
        (Workload("stepwise_surrogate", 128, 126464, kl="exact", backward=True), 15 + 23),
        (Workload("linear_token_stats", 128, 126464, dim=4096), 241 + 7.5),
        (Workload("linear_token_stats", 2048, 126464, dim=4096), 2810),
    ],
)
def test_floors(workload: Workload, microseconds: float) -> None:
    work = work_of(workload)
    assert 1e6 * floor_seconds(work, H200, "bfloat16") == pytest.approx(microseconds, rel=0.03)
    rates = achieved(work, workload, 1e-6 * microseconds, H200)
    assert rates["share_of_floor"] == pytest.approx(1, rel=0.03)


def test_a_run_writes_what_the_report_reads(tmp_path: Path) -> None:
    """In a process of its own, as users start it: a few seconds."""
    output = tmp_path / "kernels.json"
    chosen = "select_steps_segmented and 16x128 and not compile or QuACK"
    arguments = ["benchmarks/", "--benchmark-only", "-q", "-k", chosen]
    # pytest-benchmark times nothing in a process that it takes for a worker of pytest-xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, f"--benchmark-json={output}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not run here" in result.stdout and "quack-kernels is not installed" in result.stdout
    file = read(output)
    names = {row.implementation for row in file.rows}
    assert {"egspo reference", "eager"} <= names
    assert all(row.median > 0 and row.spread >= 0 for row in file.rows)
    info: dict[str, Any] = file.rows[0].info
    assert info["errors"] == {"selected": 0.0} and info["share_of_floor"] > 0
    assert file.ceilings["bytes_per_second"] > 1e8
    assert file.machine["command"].endswith(f"--benchmark-json={output}")
    assert "data" not in json.loads(output.read_text())["benchmarks"][0]["stats"]
