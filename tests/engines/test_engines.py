"""Several processes, whole models and sharded ones: the same run as one process, or an end that
says why."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from egspo.config import DistributedConfig
from egspo.config.recipe import save_config
from egspo.engines.processes import Processes
from egspo.runs.checkpoint import list_checkpoints
from egspo.runs.metrics import deterministic, read_metrics
from egspo.runs.published import verify_published
from tests.families import BLOCK_CAUSAL, new_fields
from tests.helpers import runs
from tests.helpers.runs import Strike, start

SLOW = pytest.mark.slow  # several processes

FSDP2 = {"distributed": {"engine": "fsdp2"}}
LORA = {"model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}}
EXACT_KL = {"algorithm": {"beta": 0.1, "kl": "exact", "schedule": "joint"}}
K3 = {"algorithm": {"beta": 0.1, "selected_steps": 2, "schedule": "joint"}}
CACHED = {"generation": {"cache": "dual"}, "micro_batch_size": 3}
WHOLE = {"distributed": {"engine": "replicated", "reshard": True}}
ADAPTIVE = {
    "model": {"config": {"init_std": 0.5}},  # entropies that differ
    "algorithm": {"entropy_share": 0.6, "selected_steps": 4, "stop_at_eos": False},
}
JOINT = {"model": {"config": {"init_std": 0.7}}, "algorithm": {"schedule": "joint"}}
PIPELINE = {"pipeline": True, "eval": {"every": 0}, "checkpoint": {"every": 0}}
REFRESH = {"algorithm": {"beta": 0.1, "reference_every": 1, "reference_blend": 0.5}, "steps": 3}
SHORT = {"steps": 2, "eval": {"every": 0}}
VALUES = {"algorithm": {"step_values": "head"}, "steps": 3}
COUPLED = {
    **SHORT,
    "algorithm": {
        "objective": "coupled",
        "stepwise": False,
        "schedule": "joint",
        "beta": 0.1,
        "num_iterations": 2,
    },
}


def blocks(family: str) -> list[dict[str, Any]]:
    """A block-causal model."""
    return [
        {"model": {"config": None}, "generation": {"block_length": 4, "steps": 4}},
        {"model": {"config": new_fields(family)}, "algorithm": {"beta": 0.1}},
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics and weights, to rounding."""
    first, second = ([deterministic(r) for r in read_metrics(run)] for run in (one, other))
    assert len(first) == len(second) > 1
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            # Padding depends on what shares a batch, and so does which prompts are the same.
            if name.startswith(("flops/", "rollout/", "shared/")):
                continue
            exact = value is None or isinstance(value, int | list)
            expected = value if exact else pytest.approx(value, rel=1e-3, abs=2e-6)
            assert b[name] == expected, (a["step"], name)
    assert_same_weights(one, other)


def assert_same_weights(one: Path, other: Path) -> None:
    files = sorted((one / "final").rglob("*.safetensors"))
    assert files
    for file in files:
        theirs = load_file(other / file.relative_to(one))
        for name, tensor in load_file(file).items():
            assert float((tensor - theirs[name]).abs().max()) < 1e-4, name


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        pytest.param(2, [], id="2", marks=SLOW),
        # 8 sequences: no process has whole groups only
        pytest.param(3, [SHORT], id="3", marks=SLOW),
        pytest.param(2, [FSDP2], id="2-fsdp2", marks=SLOW),
        pytest.param(3, [FSDP2, SHORT], id="3-fsdp2", marks=SLOW),
        pytest.param(2, [ADAPTIVE], id="2-adaptive", marks=SLOW),
        pytest.param(3, [ADAPTIVE, JOINT, FSDP2], id="3-fsdp2-adaptive-joint", marks=SLOW),
        pytest.param(2, [FSDP2, PIPELINE], id="2-fsdp2-pipeline", marks=SLOW),
        pytest.param(2, [FSDP2, SHORT, LORA, K3], id="2-fsdp2-lora-kl", marks=SLOW),
        pytest.param(2, [FSDP2, REFRESH], id="2-fsdp2-refresh", marks=SLOW),
        pytest.param(2, [FSDP2, REFRESH, LORA], id="2-fsdp2-refresh-lora", marks=SLOW),
        pytest.param(2, [FSDP2, SHORT, EXACT_KL], id="2-fsdp2-exact-kl", marks=SLOW),
        pytest.param(3, [FSDP2, SHORT, CACHED], id="3-fsdp2-cache", marks=SLOW),
        *(
            pytest.param(2, [FSDP2, SHORT, *blocks(family)], id=f"2-fsdp2-{family}", marks=SLOW)
            for family in BLOCK_CAUSAL
        ),
        pytest.param(
            2,
            [FSDP2, SHORT, *blocks("llada2"), {"algorithm": {"share_prompts": "always"}}],
            id="2-fsdp2-shared-prompts",
            marks=SLOW,
        ),
        pytest.param(
            2,
            [FSDP2, SHORT, *blocks("sdar_moe"), LORA, {"model": {"lora": {"experts": True}}}],
            id="2-fsdp2-lora-experts",
            marks=SLOW,
        ),
        pytest.param(2, [COUPLED], id="2-coupled", marks=SLOW),
        pytest.param(2, [SHORT, VALUES], id="2-values", marks=SLOW),
        pytest.param(3, [FSDP2, SHORT, VALUES], id="3-fsdp2-values", marks=SLOW),
        pytest.param(3, [FSDP2, COUPLED], id="3-fsdp2-coupled", marks=SLOW),
        pytest.param(
            2,
            [{"distributed": {"engine": "fsdp2", "reshard": False}}, SHORT],
            id="2-fsdp2-no-reshard",
            marks=SLOW,
        ),
    ],
)
def test_several_processes_do_what_one_does(
    processes: int, changes: list[Mapping[str, Any]], tmp_path: Path
) -> None:
    """Each with a share of the sequences, in some steps one of them with nothing to teach."""
    assert start(tmp_path / "several", processes, *changes) == [0] * processes
    assert start(tmp_path / "one", 1, *changes, WHOLE) == [0]
    assert_same_run(tmp_path / "one", tmp_path / "several")
    # One process wrote.
    assert not (tmp_path / "several" / "metrics.dropped.jsonl").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("engine", ["replicated", "fsdp2"])
@pytest.mark.parametrize("changes", [{}, LORA, K3, CACHED], ids=["full", "lora", "kl", "cache"])
def test_two_gpus_do_what_one_does(engine: str, changes: Mapping[str, Any], tmp_path: Path) -> None:
    """Over NCCL, in float32; weights go through the matrix library's rounding on other shapes."""
    changes = [SHORT, {"mixed_precision": "no", "model": {"dtype": "float32"}}, changes]
    engines = {"distributed": {"engine": engine}}
    assert start(tmp_path / "two", 2, *changes, engines, on_gpus=True) == [0, 0]
    assert start(tmp_path / "one", 1, *changes, on_gpus=True) == [0]
    assert_same_run(tmp_path / "one", tmp_path / "two")


@SLOW
def test_a_group_without_spread_leaves_a_process_without_work(tmp_path: Path) -> None:
    assert start(tmp_path / "two", 2, FSDP2) == [0, 0]
    assert 1 in {record.get("reward/equal_groups") for record in read_metrics(tmp_path / "two")}


@SLOW
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_goes_on_with_another_number_of_processes_and_engine(
    lora: bool, tmp_path: Path
) -> None:
    changes = [LORA] if lora else []
    assert start(tmp_path / "whole", 1, *changes) == [0]
    run = tmp_path / "parts"
    half, three = {"steps": 2}, {"steps": 3}
    assert start(run, 2, FSDP2, half, *changes) == [0, 0]
    assert start(
        run, 3, {"distributed": {"engine": "replicated"}}, three, *changes, resume=run
    ) == ([0, 0, 0])
    assert start(run, 3, FSDP2, *changes, resume=run) == [0, 0, 0]
    assert_same_weights(tmp_path / "whole", run)
    for checkpoint in list_checkpoints(run / "checkpoints"):
        verify_published(checkpoint)
    # And back to one process, from a checkpoint of three.
    assert start(run, 1, *changes, {"steps": 5}, resume=run) == [0]
    assert read_metrics(run)[-1]["step"] == 5


PHASES = {
    "rollout": runs.ROLLOUT,
    "reward": "egspo.rewards.queue.RewardQueue.collect",
    "select": "egspo.algorithm.phases.selection.select",
    "score": "egspo.algorithm.replay.Scorer.replay",
    "update": "egspo.algorithm.replay.Scorer.surrogate",
    "end": "egspo.training.trainer.advance",
    "evaluation": "egspo.training.trainer.evaluate",
    "saving": "egspo.training.state.save_checkpoint",
}


@SLOW
@pytest.mark.parametrize(
    ("engine", "phase"),
    [("fsdp2", p) for p in PHASES] + [("replicated", p) for p in ("rollout", "update", "saving")],
)
def test_a_process_that_is_killed_ends_the_others(engine: str, phase: str, tmp_path: Path) -> None:
    """In every phase: the others say who and where, and the last checkpoint is whole."""
    run = tmp_path / "run"
    victim = 0 if phase == "saving" else 1
    # Of a sharded model a process with nothing to teach makes as many passes.
    updates = 8 if engine == "fsdp2" else 4
    call = {"evaluation": 2, "saving": 2, "update": updates}.get(phase, 3)
    blow = Strike(victim, PHASES[phase], call, int(signal.SIGKILL))
    changes = {"distributed": {"engine": engine, "timeout": 20.0}, "checkpoint": {"every": 1}}
    codes = start(run, 2, changes, blow=blow)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == runs.LOST, codes
    message = (tmp_path / f"run.lost-{1 - victim}").read_text()
    assert f"process {1 - victim} waited in '" in message
    if victim == 0:  # it kept the list
        assert "process 0, which knows the phase of each, does not answer" in message
    else:
        assert f"process {victim} is in '" in message or "ended in the same phase" in message
    made = list_checkpoints(run / "checkpoints")
    for checkpoint in made:
        verify_published(checkpoint)
    assert made or phase in ("evaluation", "saving")
    if phase == "update":  # and it goes on from there
        assert start(run, 2, changes, resume=run) == [0, 0]


@SLOW
def test_a_process_that_does_not_come_is_named(tmp_path: Path) -> None:
    blow = Strike(1, "egspo.algorithm.phases.selection.select", 2, int(signal.SIGSTOP))
    codes = start(tmp_path / "run", 2, {"distributed": {"timeout": 3.0}}, blow=blow, seconds=10)
    assert codes == [runs.LOST, None]
    message = (tmp_path / "run.lost-0").read_text()
    assert "at most 3 s (distributed.timeout)" in message
    assert "process 1 is in 'select of step 2'" in message


@SLOW
@pytest.mark.parametrize(
    ("absent", "engine"), [(1, "replicated"), (1, "fsdp2"), (0, "replicated"), (0, "fsdp2")]
)
def test_who_does_not_come_to_the_start_is_lost(absent: int, engine: str, tmp_path: Path) -> None:
    """The one that keeps the list of who came, or the other; by the command line."""
    recipe, log = tmp_path / "recipe.yaml", tmp_path / "log"
    changes = {"distributed": {"engine": engine, "timeout": 3.0}}
    save_config(runs.config(tmp_path / "run", changes), recipe)
    process = runs.forkserver().Process(
        target=runs.command_as_rank,
        args=(["train", str(recipe)], 1 - absent, 2, runs.free_port(), log),
    )
    begin = time.monotonic()
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 4, log.read_text()
    assert time.monotonic() - begin < 55
    said = " ".join(log.read_text().split())
    assert "error: not all of the 2 processes came to the start of the run" in said
    assert "Traceback" not in said


FROZEN = {
    "base": "egspo.training.setup._base",
    **{name: PHASES[name] for name in ("rollout", "update", "end", "evaluation", "saving")},
    "final": "egspo.training.trainer.publish",
}


@SLOW
@pytest.mark.parametrize(
    ("phase", "engine"),
    [(phase, "replicated") for phase in FROZEN] + [(p, "fsdp2") for p in ("update", "saving")],
)
def test_the_main_process_is_not_waited_for_when_it_is_frozen(
    phase: str, engine: str, tmp_path: Path
) -> None:
    """Nor is its list of phases, which does not answer either."""
    call = {"base": 1, "evaluation": 2, "update": 5, "saving": 1, "final": 1}.get(phase, 3)
    blow = Strike(0, FROZEN[phase], call, int(signal.SIGSTOP))
    changes = {"distributed": {"engine": engine, "timeout": 6.0}}
    start_time = time.monotonic()
    codes = start(tmp_path / "run", 2, changes, blow=blow, seconds=60)
    assert codes == [None, runs.LOST]
    assert time.monotonic() - start_time < 55
    message = (tmp_path / "run.lost-1").read_text()
    assert "process 0, which knows the phase of each, does not answer" in message


@SLOW
@pytest.mark.parametrize("engine", ["replicated", "fsdp2"])
def test_preemption_saves_and_exits_with_its_own_code(engine: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"distributed": {"engine": engine, "timeout": 20.0}, "checkpoint": {"every": 0}}
    blow = Strike(0, "egspo.algorithm.phases.selection.select", 3, int(signal.SIGTERM))
    codes = start(run, 2, changes, blow=blow)
    assert codes[0] == 128 + signal.SIGTERM
    # The parts are saved together, after the step; a whole model at once, of the step before.
    expected = 3 if engine == "fsdp2" else 2
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.name == f"step-{expected:06d}"
    assert start(run, 2, changes, resume=run) == [0, 0]
    assert start(tmp_path / "one", 1) == [0]
    assert_same_weights(tmp_path / "one", run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (FSDP2, "distributed.engine: fsdp2 shards over processes and there is one"),
        ({"distributed": {"timeout": 0}}, "distributed.timeout must be > 0, got 0"),
        (
            {"distributed": {"engine": "replicated", "offload": True}},
            "distributed.offload: true needs distributed.engine: fsdp2, got replicated",
        ),
        (
            {"distributed": {"reshard": False}},
            "distributed.reshard: false needs distributed.engine: fsdp2, got auto",
        ),
        (
            {**FSDP2, "generation": {"cuda_graphs": True}},
            "generation.cuda_graphs does not go with fsdp2",
        ),
        (
            {**FSDP2, "optimizer": {"name": "adamw_8bit"}},
            "optimizer.name: adamw_8bit does not go with fsdp2: use adamw",
        ),
        (
            {**FSDP2, "model": {"lora": {"rank": 2}, "quantization": "nf4"}},
            "model.quantization: nf4 does not go with fsdp2",
        ),
    ],
)
def test_what_cannot_be(changes: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        runs.train_parallel(tmp_path, changes)


def test_shares_are_contiguous_and_even() -> None:
    processes = Processes(alone=True)
    for total in range(30):
        for count in range(1, 8):
            shares = []
            for rank in range(count):
                processes.rank, processes.count = rank, count
                shares.append(processes.share(total))
            assert [s for share in shares for s in share] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_default_waits_half_an_hour() -> None:
    assert DistributedConfig().timeout == 1800.0
    assert "WORLD_SIZE" not in os.environ
