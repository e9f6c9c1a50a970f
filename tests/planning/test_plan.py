"""Plans against what runs log and what a process really allocates."""

from __future__ import annotations

import json
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from egspo.cli import main
from egspo.config import DistributedConfig, TrainConfig
from egspo.config.recipe import config_to_dict
from egspo.models import LLaDAConfig, add_lora, load_model
from egspo.planning.expected_work import Shares
from egspo.planning.memory import estimate_memory
from egspo.planning.plan import PHASES, PlanError, Planner, measured_shares, read_rates
from egspo.runs.metrics import read_metrics
from egspo.tasks import Reward
from egspo.training.trainer import Trainer, train
from tests.helpers import runs
from tests.helpers.runs import LETTERS
from tests.planning.test_dry_run import by_path, model_folder

pytestmark = pytest.mark.usefixtures("no_plots", "varied")

SLOW = pytest.mark.slow
LORA = {"model": {"lora": {"rank": 8, "alpha": 8, "dropout": 0.05}}}
# Every group teaches something, and every trajectory has all its steps.
FULL: dict[str, Any] = {
    **LETTERS,
    "generation": {**LETTERS["generation"], "early_exit": False},
    "algorithm": {"stop_at_eos": False},
    "eval": {"every": 0, "examples": 1},
}


def planned(config: TrainConfig, gpus: int = 1, **shares: float) -> Planner:
    return Planner(config, gpus, Shares(**shares))


# A policy that hardly moves does not come to say the same four times.
STILL: dict[str, Any] = {"optimizer": {"learning_rate": 1e-6}}


def hashed(completions: Sequence[str], **_: Any) -> list[float]:
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


# --- FLOPs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm": {"beta": 0.1, "kl": "k3", "num_iterations": 2}, **LORA},
        {"algorithm": {"beta": 0.1, "kl": "exact", "schedule": "per_step"}},
        {"algorithm": {"strategy": "all", "stepwise": False, "entropy_over": "masked"}},
        {"generation": {"cache": "dual"}, "algorithm": {"schedule": "per_step"}},
        {"generation": {"cache": "dual", "guidance": 0.5}, "algorithm": {"strategy": "all"}},
        {"generation": {"cache": "prefix"}, "algorithm": {"strategy": "all"}},
        {"model": {"gradient_checkpointing": True}, "generation": {"batch_size": 3}},
        {"micro_batch_size": None, "micro_batch_tokens": 60},
        {"algorithm": {"beta": 0.1, "reference_every": 2}, **LORA},
        {"algorithm": {"step_values": "head"}},
    ],
    ids=range(11),
)
def test_flops_are_those_a_run_logs(changes: dict[str, Any], tmp_path: Path) -> None:
    """Of prompts of different lengths; which steps are trained decides the head's rows alone."""
    # No reward is its group's mean: an update leaves states out whose advantage is 0.
    runs.rewards[:] = [Reward("hashed", hashed)]
    config = runs.config(tmp_path, FULL, STILL, changes)
    plan = planned(config).plan
    train(config)
    records = read_metrics(tmp_path)[1:]
    assert len(records) == 4
    for record in records:
        assert record["skipped/groups"] == record["skipped/states"] == 0
    for phase in PHASES:
        logged = sum(record[f"flops/{phase}"] for record in records) / 4
        exact = phase != "score"
        assert plan.flops[phase] == pytest.approx(logged, rel=1e-6 if exact else 0.02), phase


def test_an_adapter_to_continue_from_is_checkpointed_too(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", weights=True)
    add_lora(load_model(folder), rank=4, alpha=8, dropout=0.0, seed=0).save_pretrained(
        tmp_path / "adapter"
    )
    plain, again = (
        planned(runs.config(tmp_path / "run", by_path(folder, **options))).plan
        for options in (
            {"adapter": str(tmp_path / "adapter")},
            {"adapter": str(tmp_path / "adapter"), "gradient_checkpointing": True},
        )
    )
    assert again.flops["update"] > plain.flops["update"]
    assert again.flops["score"] == plain.flops["score"]


def test_what_early_exit_and_skipped_groups_save(tmp_path: Path) -> None:
    config = runs.config(tmp_path, FULL, {"generation": {"early_exit": True}, "steps": 3})
    train(config)
    shares = measured_shares(tmp_path)
    records = read_metrics(tmp_path)[1:]
    assert shares.saved_steps == sum(r["rollout/saved"] for r in records) / 3
    most = 3 * 2 * 4 * 3
    scored, skipped = (sum(r[f"{n}/states"] for r in records) for n in ("selected", "skipped"))
    assert (shares.scored_states, shares.trained_states) == (
        scored / most,
        (scored - skipped) / most,
    )
    full = planned(config).plan.flops
    less = Planner(config, 1, shares).plan.flops
    assert less["rollout"] == pytest.approx((1 - shares.saved_steps) * full["rollout"], rel=1e-6)
    parts = planned(config, scored_states=0.5, trained_states=0.25).plan.flops
    assert [2 * parts["score"], 4 * parts["update"]] == pytest.approx(
        [full["score"], full["update"]], rel=1e-6
    )
    for wrong in ({"saved_steps": 1.0}, {"scored_states": -0.1}, {"trained_states": 1.5}):
        with pytest.raises(ValueError, match="must be in"):
            Shares(**wrong)


def test_gpus_share_the_prompts(tmp_path: Path) -> None:
    config = runs.config(tmp_path, FULL, {"prompts_per_step": 4, "generation": {"batch_size": 99}})
    one, two = (planned(config, gpus).plan for gpus in (1, 2))
    # In one batch, short prompts are padded to the longest of all processes or of one.
    assert one.flops["rollout"] == pytest.approx(two.flops["rollout"], rel=0.2)
    rollout = [
        next(i.bytes for i in plan.memory if i.name == "rollout activations") for plan in (one, two)
    ]
    assert rollout[0] == 2 * rollout[1]
    # Sequences are divided, not prompts: three of four prompts' groups are split.
    assert planned(config, 3).plan.flops["update"] == pytest.approx(one.flops["update"], rel=0.2)
    with pytest.raises(ValueError, match=r"between 1 and the 16 sequences of a step .* got 17"):
        planned(config, 17)


def test_sharding_divides_what_is_trained(tmp_path: Path) -> None:
    config = runs.config(tmp_path, FULL, {"prompts_per_step": 8})
    whole = planned(config, 4)
    with pytest.raises(ValueError, match="fsdp2 shards over processes: plan it with two"):
        planned(replace(config, distributed=DistributedConfig("fsdp2")))
    sharded = planned(replace(config, distributed=DistributedConfig("fsdp2")), 4)
    assert sharded.plan.flops == whole.plan.flops

    def always(planner: Planner) -> int:
        return sum(item.bytes for item in planner.plan.memory if item.phase == "always")

    assert always(sharded) == pytest.approx(always(whole) / 4, rel=1e-6)
    assert any(
        suggestion.changes == {"distributed.engine": "fsdp2"}
        for suggestion in whole.suggestions(whole.plan.peak - 1)
    )
    assert not any(
        "distributed.engine" in suggestion.changes
        for suggestion in planned(config).suggestions(whole.plan.peak - 1)
    )


# --- Bytes


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that operators make inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.storages:
            return

        def freed(_: object) -> None:
            del self.storages[key]
            self.now -= size

        self.storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def array_of(storage: torch.UntypedStorage, _: torch.device) -> Any:
    """The bytes of ``storage``, where no tensor holds them."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().copy()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="full"),
        pytest.param(LORA, id="lora", marks=SLOW),
        pytest.param({"model": {"gradient_checkpointing": True}}, id="checkpointed", marks=SLOW),
        pytest.param(
            {"model": {"gradient_checkpointing": True, **LORA["model"]}},
            id="lora-checkpointed",
            marks=SLOW,
        ),
        pytest.param({"model": {"dtype": "bfloat16", **LORA["model"]}}, id="lora-bf16", marks=SLOW),
        pytest.param({"mixed_precision": "no"}, id="float32", marks=SLOW),
        pytest.param(
            {"algorithm": {"beta": 0.1, "reference_every": 1}, **LORA},
            id="lora-refreshed",
            marks=SLOW,
        ),
        pytest.param({"model": {"activation_offload": True}}, id="offloaded", marks=SLOW),
        pytest.param(
            {"model": {"activation_offload": True, "dtype": "bfloat16", **LORA["model"]}},
            id="lora-bf16-offloaded",
            marks=SLOW,
        ),
        pytest.param(
            {
                "model": {
                    "activation_offload": True,
                    "gradient_checkpointing": True,
                    **LORA["model"],
                }
            },
            id="lora-checkpointed-offloaded",
            marks=SLOW,
        ),
    ],
)
def test_the_peak_of_the_update_is_what_it_allocates(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimizer, gradients and activations, in the second of four micro-batches.

    What is offloaded is kept where it is not counted: in an array.
    """
    monkeypatch.setattr("egspo.models.offload._to_host", array_of)
    monkeypatch.setattr("egspo.models.offload._to_device", lambda host, _: torch.tensor(host))
    sizes = {"d_model": 64, "n_layers": 8, "n_heads": 4, "mlp_hidden_size": 192}
    common = {
        "model": {"config": sizes},
        "algorithm": {"group_size": 4, "selected_steps": 4},
        "mixed_precision": "bf16",
        "task": {"options": {"train": 1}},
    }
    config = runs.config(tmp_path, FULL, common, changes)
    trainer = Trainer(config)
    iteration = trainer.iteration
    offload, micro_batches = trainer.denoiser.offload, 0
    if offload is not None:
        offload.smallest = 1024
        inside = type(offload).__call__

        def counted(self: Any) -> Any:
            nonlocal micro_batches
            micro_batches += torch.is_grad_enabled()
            return inside(self)

        monkeypatch.setattr(type(offload), "__call__", counted)
    iteration.run(1, [0, 0], 0)  # the optimizer makes its moments
    update, allocated = iteration.optimize, Allocated()

    def measured(*arguments: Any) -> Any:
        with allocated:
            for parameter in trainer.denoiser.model.parameters():
                allocated.add(parameter)
            for moments in iteration.engine.optimizer.state.values():
                for tensor in moments.values():
                    allocated.add(tensor)
            return update(*arguments)

    iteration.optimize = measured  # type: ignore[assignment]
    iteration.run(2, [0, 0], 100)
    prompt = len(trainer.data.train.token_ids[0])
    parts = estimate_memory(config, trainer.denoiser.model, prompt)
    expected = sum(part.bytes for part in parts if part.phase in ("always", "update"))
    assert allocated.peak == pytest.approx(expected, rel=0.1)
    if offload is not None:
        moved = next(part.bytes for part in parts if part.phase == "host")
        # A group of equal rewards, which rounding decides, needs none.
        assert offload.bytes / micro_batches == pytest.approx(moved, rel=0.1)
    moments = next(part.bytes for part in parts if part.name == "optimizer")
    assert allocated.now >= moments


# --- What would make it fit

EXPENSIVE: dict[str, Any] = {
    **FULL,
    "model": {"config": {"d_model": 64, "n_layers": 8, "mlp_hidden_size": 192}},
    "algorithm": {**FULL["algorithm"], "beta": 0.1},
    "generation": {**FULL["generation"], "cache": "dual"},
    "micro_batch_size": 16,
}


def test_suggestions_are_planned_and_hold(tmp_path: Path) -> None:
    config = runs.config(tmp_path, EXPENSIVE)
    planner = planned(config)
    peak = planner.plan.peak
    lowest = planner.suggestions(0)[-1].plan.peak
    for available in (0.9 * peak, 0.5 * peak, lowest):
        found = planner.suggestions(int(available))
        assert any(each.plan.peak <= available for each in found)
        for each in found:
            assert each.plan.peak < peak and each.effect
            changes = yaml.safe_load(json.dumps(each.changes))
            again = planned(runs.config(tmp_path, EXPENSIVE, nested(changes)))
            assert again.plan == each.plan
    alone = [each for each in planner.suggestions(0) if len(each.changes) == 1]
    assert {name for each in alone for name in each.changes} == {
        *("model.gradient_checkpointing", "micro_batch_size", "model.activation_offload"),
        *("generation.cache", "algorithm.beta"),
    }
    together = planner.suggestions(0)[-1]
    assert together.plan.peak < min(each.plan.peak for each in alone)


def test_adapters_make_a_model_of_the_published_size_fit(tmp_path: Path) -> None:
    """In float32, 8 billion trained weights need 16 bytes each; an adapter's base 2 on a GPU."""
    LLaDAConfig().save_pretrained(tmp_path / "model")
    config = runs.config(tmp_path / "run", by_path(tmp_path / "model"), {"generation": None})
    planner = planned(config)
    assert planner.plan.peak > 16 * 8_015_581_184
    (fitting,) = [each for each in planner.suggestions(80 * 10**9) if each.plan.peak <= 80e9]
    assert fitting.changes == {"model.lora.rank": 128}
    assert fitting.overrides == ["model.lora.rank=128"]


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in changes.items():
        *sections, name = path.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree


def test_no_more_is_changed_together_than_is_needed(tmp_path: Path) -> None:
    planner = planned(runs.config(tmp_path, EXPENSIVE))
    alone = [each.plan.peak for each in planner.suggestions(0) if len(each.changes) == 1]
    available = min(alone) - 1
    together = planner.suggestions(available)[-1]
    assert len(together.changes) > 1 and together.plan.peak <= available
    for name in together.changes:
        fewer = {key: value for key, value in together.changes.items() if key != name}
        assert planned(runs.config(tmp_path, EXPENSIVE, nested(fewer))).plan.peak > available


# --- The command line


def recipe(folder: Path, *changes: dict[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(runs.config(folder / "run", FULL, *changes))))
    return str(path)


def test_exit_codes_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["plan", path, "--gpu-memory", "24GB", "--tflops", "2"]) == 0
    out = capsys.readouterr().out
    assert "The recipe fits" in out and " hours, " in out and "Not covered" in out
    assert main(["plan", path, "--gpu-memory", "0.2MB", "model.config.n_layers=9"]) == 3
    out = capsys.readouterr().out
    assert "does not fit" in out and "model.gradient_checkpointing=true" in out
    assert (
        " hours, " not in out and "--rates gives GPU-hours" in out
    )  # no rate was given, and none is made up
    assert main(["plan", path, "--gpu-memory", "1MB", "micro_batch_size=x"]) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = tmp_path / "rates.json"
    rates.write_text('{"rollout": 2, "score": 1.0, "update": 0.5, "gpu": "some"}')
    arguments = ["plan", recipe(tmp_path), "--gpus", "2", "--json", "--rates", str(rates)]
    assert main([*arguments, "--gpu-memory", "0.01MiB"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["gpu_memory"], found["gpus"]) == (False, 10485, 2)
    assert found["seconds"]["update"] == found["flops"]["update"] / 2 / 0.5e12
    assert found["peak"] > 10485 and not any(s["fits"] for s in found["suggestions"])
    assert found["prompts_known"] and found["memory"][0]["name"] == "weights"


def test_rates_of_a_run(tmp_path: Path) -> None:
    config = runs.config(tmp_path, FULL, {"steps": 3})
    train(config)
    records = read_metrics(tmp_path)[2:]
    expected = sum(r["flops/update"] for r in records) / sum(r["time/update"] for r in records)
    for file in (tmp_path, tmp_path / "metrics.jsonl"):
        assert read_rates(file)["update"] == expected


@pytest.mark.parametrize("text", ["24", "24 parsecs", "0GB", "GB"])
def test_sizes_that_are_none(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", recipe(tmp_path), "--gpu-memory", text])
    assert exit_info.value.code == 2
    assert "such as 24GB" in capsys.readouterr().err


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "rates.json"
    bad.write_text('{"rollout": 2, "score": 0}')
    command = ["plan", recipe(tmp_path), "--gpu-memory", "1GB"]
    for options, message in (
        (["--rates", str(bad)], "no rate of the phase 'score'"),
        (["--tflops", "0"], "--tflops must be > 0"),
        (["--gpus", "999"], "gpus must be between 1 and the"),
        (["--saved-steps", "1"], "saved_steps must be in [0, 1)"),
        (["--measured", str(tmp_path)], "no metrics at"),
        (["--measured", str(tmp_path), "--saved-steps", "0"], "leave out --saved-steps"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err


def test_a_model_without_weights_or_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "model", max_sequence_length=512)
    assert not list(folder.glob("*.safetensors"))
    absent = {"task": {"name": "sudoku", "options": {"path": str(tmp_path / "absent.csv")}}}
    planner = planned(runs.config(tmp_path / "run", by_path(folder), absent))
    assert planner.plan.peak > 0 and not planner.looked.prompts_known
    (folder / "config.json").unlink()
    with pytest.raises(PlanError, match=r"the model is not known; .*config\.json"):
        planned(runs.config(tmp_path / "run", by_path(folder), absent))
