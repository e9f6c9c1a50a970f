"""A reference policy that is refreshed: of full weights and of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from egspo.algorithm.reference import REFERENCE_FILE, ReferenceRefresh
from egspo.files import CheckpointError
from egspo.models import add_lora, load_model, reference_mode
from egspo.models.lora import add_reference_adapter, reference_factors
from egspo.planning.expected_work import Shares
from egspo.planning.plan import Planner, changed
from egspo.runs.checkpoint import find_checkpoint
from egspo.runs.metrics import deterministic, read_metrics
from egspo.training.export import export
from egspo.training.trainer import Trainer, train
from tests.helpers import runs
from tests.planning.test_memory import build
from tests.training.test_resume import interrupting

pytestmark = pytest.mark.usefixtures("no_plots", "varied")

LORA: dict[str, Any] = {"model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}}
COMMON: dict[str, Any] = {
    **runs.LETTERS,
    "steps": 5,
    "algorithm": {"beta": 0.04, "reference_every": 2},
    "eval": {"every": 0, "examples": 1},
    "checkpoint": {"every": 1, "keep_last": 9, "keep_best": False},
}
KINDS = pytest.mark.parametrize("kind", [{}, LORA], ids=["full", "lora"])


@KINDS
def test_the_kl_is_zero_after_a_copy_and_as_without_before(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    train(runs.config(tmp_path / "run", COMMON, kind))
    kl = {r["step"]: r["kl"] for r in read_metrics(tmp_path / "run")[1:]}
    assert kl[1] == kl[3] == kl[5] == 0 and kl[2] > 0 and kl[4] > 0
    never = {"algorithm": {"reference_every": None}, "steps": 3}
    train(runs.config(tmp_path / "never", COMMON, kind, never))
    records = [
        [deterministic(r) for r in read_metrics(tmp_path / name)] for name in ("run", "never")
    ]
    assert records[0][1:3] == records[1][1:3]
    assert records[1][3]["kl"] > 0


def test_the_exact_kl_goes_to_the_refreshed_reference_too(tmp_path: Path) -> None:
    train(runs.config(tmp_path, COMMON, LORA, {"algorithm": {"kl": "exact"}, "steps": 4}))
    kl = [r["kl"] for r in read_metrics(tmp_path)[1:]]
    assert abs(kl[2]) < 1e-6 < kl[1] and kl[3] > 1e-6


@KINDS
def test_nothing_is_made_ahead_of_a_refresh(kind: dict[str, Any], tmp_path: Path) -> None:
    """The KL of a batch is to the reference that its update has."""
    options = {"pipeline": True, "checkpoint": {"every": 0}, "steps": 5}
    train(runs.config(tmp_path, COMMON, kind, options))
    records = read_metrics(tmp_path)[1:]
    assert [record["staleness"] for record in records] == [0, 1, 0, 1, 0]
    assert records[2]["kl"] == records[4]["kl"] == 0 < records[3]["kl"]


@KINDS
def test_interrupted_and_resumed_is_bit_identical(kind: dict[str, Any], tmp_path: Path) -> None:
    """Of a blend, whose state no policy has, and after an interrupt between two refreshes."""
    options = (COMMON, kind, {"algorithm": {"reference_blend": 0.5}, "steps": 6})
    train(runs.config(tmp_path / "whole", *options))
    config = runs.config(tmp_path / "run", *options)
    with interrupting(runs.ROLLOUT, 6), pytest.raises(KeyboardInterrupt):
        train(config)
    train(config, resume=tmp_path / "run")
    assert runs.outcome(tmp_path / "run") == runs.outcome(tmp_path / "whole")
    for step in range(1, 7):
        files = [
            tmp_path / name / "checkpoints" / f"step-{step:06d}" / REFERENCE_FILE
            for name in ("whole", "run")
        ]
        assert files[0].exists() == files[1].exists() == (step >= 2)
        if step >= 2:
            assert files[0].read_bytes() == files[1].read_bytes()
    kl = [r["kl"] for r in read_metrics(tmp_path / "run")[1:]]
    assert all(value > 0 for value in kl[1:])  # half of the way leaves a distance


@KINDS
def test_a_blend_is_one_of_numbers(kind: dict[str, Any], tmp_path: Path) -> None:
    blend = {"algorithm": {"reference_blend": 0.25}}
    trainer = Trainer(runs.config(tmp_path, COMMON, kind, blend))
    refresh = trainer.reference
    policy, reference = refresh._weights()
    before = {name: t.clone() for name, t in reference.items()}
    assert before and refresh.bytes == sum(t.nbytes for t in before.values())
    with torch.no_grad():
        for tensor in policy.values():
            tensor.add_(torch.randn_like(tensor))
    refresh.after(1)
    assert all(torch.equal(before[n], t) for n, t in reference.items())
    refresh.after(2)
    for name, tensor in reference.items():
        expected = 0.25 * policy[name] + 0.75 * before[name]
        assert torch.allclose(tensor, expected, atol=1e-6), name
        assert not tensor.requires_grad
    assert all(t.requires_grad for t in policy.values())


def test_the_saved_adapter_is_a_plain_one(tmp_path: Path) -> None:
    config = runs.config(tmp_path / "run", COMMON, LORA, {"steps": 3})
    train(config)
    for folder in (tmp_path / "run" / "final", find_checkpoint(tmp_path / "run")):
        adapter = folder / "adapter"
        assert not [p for p in adapter.rglob("*") if p.is_dir()]
        names = load_file(adapter / "adapter_model.safetensors").keys()
        assert names and not any("reference" in name for name in names)
        assert (folder / REFERENCE_FILE).exists() == (folder.name != "final")
    base = load_model(tmp_path / "run" / "base" / "model")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "final" / "adapter"))
    assert list(loaded.peft_config) == ["default"]
    ids = torch.arange(6)[None]
    expected = loaded.eval()(input_ids=ids).logits
    export(tmp_path / "run", tmp_path / "merged")
    merged = load_model(tmp_path / "merged").eval()
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)


def test_a_reference_adapter_changes_nothing_of_the_policy() -> None:
    model = build("llada", 1, torch.float32, lora=False)
    ids = torch.arange(6)[None]
    base = model(input_ids=ids).logits
    adapted = add_lora(model, rank=2, alpha=2, dropout=0.0, seed=0).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = adapted(input_ids=ids).logits
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    state = torch.get_rng_state()
    add_reference_adapter(adapted)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(adapted(input_ids=ids).logits, expected)
    assert not torch.equal(expected, base)
    policy, reference = reference_factors(adapted)
    assert all(torch.equal(factor, policy[name]) for name, factor in reference.items())
    with reference_mode(adapted, "reference"):
        assert torch.equal(adapted(input_ids=ids).logits, expected)
        policy[next(n for n in policy if "lora_B" in n)].data.zero_()
        assert torch.equal(adapted(input_ids=ids).logits, expected)
    assert not torch.equal(adapted(input_ids=ids).logits, expected)
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == trainable
    with (
        pytest.raises(ValueError, match="no adapter 'other', only"),
        reference_mode(adapted, "other"),
    ):
        pass


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"reference_every": 0}, r"algorithm.reference_every must be > 0, .* got 0"),
        ({"beta": 0.0}, r"algorithm.reference_every \(2\) needs algorithm.beta > 0"),
        ({"reference_blend": 1.5}, r"algorithm.reference_blend must be in \(0, 1\], got 1.5"),
        ({"reference_blend": 0.0}, r"algorithm.reference_blend must be in \(0, 1\], got 0.0"),
        (
            {"reference_blend": 0.5, "reference_every": None},
            r"algorithm.reference_blend \(0.5\) needs algorithm.reference_every",
        ),
    ],
)
def test_what_is_refused(algorithm: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        runs.config(tmp_path, COMMON, {"algorithm": algorithm})


def test_a_checkpoint_without_its_reference(tmp_path: Path) -> None:
    trainer = Trainer(runs.config(tmp_path / "run", COMMON, LORA))
    assert isinstance(trainer.reference, ReferenceRefresh)
    trainer.reference.load(tmp_path, 1)  # there was none yet
    with pytest.raises(CheckpointError, match=f"has no {REFERENCE_FILE}"):
        trainer.reference.load(tmp_path, 2)
    trainer.reference.collect(2, main=True)
    trainer.reference.save(tmp_path)
    other = Trainer(
        runs.config(tmp_path / "other", COMMON, {"model": {"lora": {"rank": 2, "alpha": 8}}})
    )
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*lora_A.* differ"):
        other.reference.load(tmp_path, 2)


@KINDS
def test_a_plan_knows_what_it_costs_and_how_to_go_without(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    planner = Planner(runs.config(tmp_path, COMMON, kind), 1, Shares())
    parts = {part.name: part.bytes for part in planner.plan.memory}
    if kind:
        assert parts["reference adapter"] == parts["adapters"] > 0
    else:
        assert parts["reference policy"] == parts["weights"] and "reference adapter" not in parts
    found = [s for s in planner.suggestions(0) if "algorithm.reference_every" in s.changes]
    assert found and found[0].plan.peak < planner.plan.peak
    assert changed(planner.config, found[0].changes).algorithm.reference_every is None
