"""A value head: the reward that a state is going to have, predicted without passes of its own."""

from __future__ import annotations

import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egspo.algorithm.batch import Metrics
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig
from egspo.engines.processes import Processes
from egspo.files import CheckpointError
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import Trajectory

VALUE_FILE = "value_head.pt"
"""Of a checkpoint: weights and moments."""
UPDATES = 8
"""Gradient steps on the states of a rollout."""
_MOMENTS = "exp_avg", "exp_avg_sq"
_MISFITS = (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError)


class ValueHead:
    """A linear function of a state's hidden states, trained on the rewards of rollouts.

    Its input is the mean over the active block of the hidden states that the rollout made before a
    step (:attr:`egspo.rollouts.trajectory.Trajectory.pooled`), normalised to the length 1:

        V(s) = w . LayerNorm(mean_i h_i(s)) / sqrt(D) + b

    That is a function of the state alone, and with weights from before its rollout a baseline that
    keeps the gradient of the policy as it is in expectation. It begins with V = 0. Every rollout is
    predicted first; then Adam makes :data:`UPDATES` steps on the mean squared error over all states
    of all its completions with a reward. The hidden states were made without gradients: nothing of
    that error reaches the policy, nor the norm that its gradient is clipped by.

    It belongs to no engine: every process has it whole, and adds up the gradients of all.

    Args:
        config: with ``step_values: head``.
        denoiser: of the policy; counts the head's products.
        processes: this one among all of them.
    """

    def __init__(self, config: AlgorithmConfig, denoiser: Denoiser, processes: Processes) -> None:
        self.denoiser, self.processes = denoiser, processes
        weight = denoiser.head_weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.linear = nn.Linear(weight.shape[1], 1, device=denoiser.device, dtype=dtype)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)
        self.optimizer = torch.optim.Adam(self.linear.parameters(), lr=config.value_learning_rate)

    @classmethod
    def of(
        cls, config: AlgorithmConfig, denoiser: Denoiser, processes: Processes
    ) -> ValueHead | None:
        """None where the run has none."""
        return cls(config, denoiser, processes) if config.predicts else None

    @torch.no_grad()
    def predict(self, states: States) -> Tensor:
        """Of M states: float64 [M] on the CPU."""
        pooled = _pooled(states.trajectory)
        return self._values(_normalised(pooled[states.row, states.step])).double().cpu()

    def train(self, trajectory: Trajectory, rewards: Tensor) -> Metrics:
        """Learn from the rollout of all processes.

        Args:
            trajectory: B completions here, with their pooled hidden states.
            rewards: float64 [B] on the CPU, NaN where there is none.

        Returns:
            ``value/loss``, the mean squared error before, and ``value/explained``, the share of the
            variance of the rewards that it is not; None without rewards, or of equal ones.
        """
        reward = rewards.to(trajectory.tokens.device)[:, None]
        steps = torch.arange(trajectory.num_steps, device=reward.device)
        known = (steps < trajectory.steps[:, None]) & ~reward.isnan()
        inputs = _normalised(_pooled(trajectory)[known])
        target = reward.expand(known.shape)[known].to(inputs.dtype)
        count, differ = self._count(target)
        if not count:
            return {"value/loss": None, "value/explained": None}
        mean = self._total(target) / count
        variance = self._total((target.double() - mean).square()) / count
        loss = math.nan
        for update in range(UPDATES):
            error = self._values(inputs) - target
            if update == 0:
                loss = self._total(error.detach().square()) / count
            (error.square().sum() / count).backward()  # type: ignore[no-untyped-call]
            self.denoiser.work.value_rows += len(target)
            for parameter in self.linear.parameters():
                assert parameter.grad is not None
                every = self.processes.gather(parameter.grad.cpu())
                parameter.grad = torch.stack(every).sum(0).to(parameter.device)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {"value/loss": loss, "value/explained": 1 - loss / variance if differ else None}

    def save(self, folder: Path) -> None:
        """Put everything into the folder of a checkpoint."""
        torch.save(self._state(), folder / VALUE_FILE)

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` did.

        Raises:
            CheckpointError: the file is missing or does not fit the model.
        """
        file = folder / VALUE_FILE
        if not file.is_file():
            raise CheckpointError(f"{folder} has no {VALUE_FILE}, the value head")
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            self.linear.load_state_dict(saved["head"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for parameter, moments in self.optimizer.state.items():
                if {moments[name].shape for name in _MOMENTS} != {parameter.shape}:
                    raise ValueError(f"moments are not of the shape {list(parameter.shape)}")
        except (*_MISFITS, UnpicklingError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(f"{file} does not fit the model: {reason}") from error

    def _state(self) -> dict[str, Any]:
        return {"head": self.linear.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _values(self, inputs: Tensor) -> Tensor:
        """[N] of normalised hidden states [N, D]."""
        self.denoiser.work.value_rows += len(inputs)
        values: Tensor = self.linear(inputs)[:, 0]
        return values

    def _total(self, values: Tensor) -> float:
        """Over all processes, which add it up in the same order."""
        return sum(self.processes.gather(float(values.double().sum())))

    def _count(self, target: Tensor) -> tuple[int, bool]:
        """How many there are in all processes, and whether they differ."""
        least, most = (float(v) for v in target.aminmax()) if len(target) else (math.inf, -math.inf)
        counts, lows, highs = zip(*self.processes.gather((len(target), least, most)), strict=True)
        return sum(counts), min(lows) < max(highs)


def _pooled(trajectory: Trajectory) -> Tensor:
    assert trajectory.pooled is not None
    return trajectory.pooled


def _normalised(pooled: Tensor) -> Tensor:
    width = pooled.shape[-1]
    return F.layer_norm(pooled, (width,)) / math.sqrt(width)
