"""Activation offload: the same numbers, with what autograd saves in host memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from egspo.config import TrainConfig
from egspo.models.offload import ActivationOffload
from egspo.tasks import Reward
from egspo.training.trainer import Trainer
from tests.helpers import runs
from tests.planning.test_memory import TOKENS, build, kept_by_autograd

LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
SMALL = {"config": {**runs.MODEL, "n_layers": 3}}


@pytest.fixture(autouse=True)
def varied() -> Iterator[None]:
    runs.rewards[:] = [Reward("varied", runs.varied)]
    yield
    runs.rewards.clear()


def updated(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """The trainer after a step of two updates, and every loss and gradient on the way."""
    trainer = Trainer(config)
    if trainer.denoiser.offload is not None:
        trainer.denoiser.offload.smallest = 1
    seen: list[Any] = []
    backward = trainer.engine.backward

    def noting(loss: Any, **options: Any) -> None:
        backward(loss, **options)
        seen.append(loss.detach())
        seen.extend(
            p.grad.clone() for p in trainer.denoiser.model.parameters() if p.grad is not None
        )

    monkeypatch.setattr(trainer.engine, "backward", noting)
    trainer.iteration.run(1, [0, 1], 0)
    return trainer, seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"gradient_checkpointing": True}},
        {"model": {**LORA, "dtype": "bfloat16"}, "mixed_precision": "bf16"},
        {"model": {**LORA, "gradient_checkpointing": True}, "algorithm": {"kl": "exact"}},
        {"generation": {"cache": "prefix", "guidance": 0.5}, "mixed_precision": "bf16"},
        {"generation": {"cache": "dual"}, "model": {"gradient_checkpointing": True}},
    ],
    ids=["full", "checkpointed", "lora-bf16", "lora-checkpointed", "prefix-bf16", "dual"],
)
def test_losses_and_gradients_are_the_same_to_the_bit(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"model": SMALL, "algorithm": {"num_iterations": 2, "beta": 0.04}}
    plain, offloaded = (
        updated(
            runs.config(
                tmp_path / str(on),
                runs.LETTERS,
                common,
                changes,
                {"model": {"activation_offload": on}},
            ),
            monkeypatch,
        )
        for on in (False, True)
    )
    assert plain[0].denoiser.offload is None
    offload = offloaded[0].denoiser.offload
    assert offload.storages > 0 and offload.bytes > 0 and not offload._moved
    assert len(plain[1]) == len(offloaded[1]) > 2
    assert all(torch.equal(a, b) for a, b in zip(plain[1], offloaded[1], strict=True))
    assert any(value.ndim and value.abs().max() > 0 for value in offloaded[1])
    weights = [dict(t.denoiser.model.named_parameters()) for t, _ in (plain, offloaded)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_that_autograd_keeps_is_moved_once_and_no_parameter(
    lora: bool, checkpointing: bool
) -> None:
    model = build("llada", 2, torch.float32, lora)
    if checkpointing:
        model.checkpoint_activations()
    offload = ActivationOffload(model.parameters(), smallest=1)
    with offload(), torch.autocast("cpu", torch.bfloat16):
        output = model(
            input_ids=torch.zeros(TOKENS, dtype=torch.long), compute_logits=False
        ).last_hidden_state
    assert offload.bytes == kept_by_autograd(model)
    output.sum().backward()
    del output
    assert not offload._moved


def test_what_is_small_stays() -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    for size, moved in ((4096, 1), (4095, 0)):  # 64 KiB are 4096 x 4 float32
        offload = ActivationOffload([torch.nn.Parameter(weight)])
        x = torch.ones(size, 4)
        with offload():
            (x * weight[0, :4]).sum().backward()
        assert offload.storages == moved


def test_weights_stay_wherever_they_come_from() -> None:
    """A sharded engine gathers them into storages that there were not before."""
    offload = ActivationOffload([], smallest=1)
    linear = torch.nn.Linear(8, 8, bias=False)
    inputs = torch.randn(2, 8, requires_grad=True)
    with offload():
        loss = linear(inputs.exp()).sum()
    assert offload.bytes == inputs.nbytes
    loss.backward()


def test_strides_shapes_and_views_come_back() -> None:
    offload = ActivationOffload([], smallest=1)
    base = torch.arange(24.0).view(2, 3, 4)
    views = [
        base,
        base.transpose(0, 2),
        base[:, 1:, ::2],
        base[:, :1].expand(2, 5, 4),
        base[1, 2, 3],
    ]
    for view in views:
        packed = offload._pack(view)
        again = offload._unpack(packed)
        assert torch.equal(again, view) and again.data_ptr() != view.data_ptr()
        assert again.stride() == view.stride() and again.dtype == view.dtype
    assert offload.storages == 1


def test_a_tensor_that_changes_between_two_uses_is_moved_twice() -> None:
    """Without offload autograd refuses: the first use would see the change."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        first = y * y
        y.add_(1)
        return (first + y * y).sum()

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss(x).backward()
    offload = ActivationOffload([], smallest=1)
    with offload():
        result = loss(x)
    result.backward()
    assert x.grad is not None and x.grad.tolist() == [20.0] * 3  # 8 x + 4 (2 x + 1)
    assert offload.storages == 2


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_holds_less(checkpointing: bool) -> None:
    peaks, gradients = [], []
    for on in (False, True):
        model = build("llada", 16, torch.bfloat16, True).cuda()
        if checkpointing:
            model.checkpoint_activations()
        offload = ActivationOffload(model.parameters())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ids = torch.zeros(16, 256, dtype=torch.long, device="cuda")
        with offload() if on else nullcontext():
            output = model(input_ids=ids, compute_logits=False).last_hidden_state
        output.float().square().sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert (offload.bytes > 0) == on
        del output, model
    for a, b in zip(*gradients, strict=True):  # attention adds up in no fixed order there
        torch.testing.assert_close(a, b)
    assert peaks[1] < (0.85 if checkpointing else 0.5) * peaks[0]


def test_a_cpu_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "egspo"):
        Trainer(runs.config(tmp_path, runs.LETTERS, {"model": {"activation_offload": True}}))
    assert "model.activation_offload saves nothing on a CPU" in caplog.text
