"""What is measured: functions, shapes, inputs, and the least work each can be done with.

Temperature is 1 and no token is banned, which every peer can do too; steps are averaged over their
tokens for the same reason. None of the three changes what a kernel reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

VOCAB, DIM = 126464, 4096  # LLaDA-8B
TOKENS_PER_STEP = 4
CLIP = 0.2
BETA = 0.04

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]

_VECTOR_FLOPS = 6
"""Per logit: scale, subtract, exponential, add, multiply, add."""


class Work(NamedTuple):
    """The least a workload can be done with; see :func:`floor_seconds`."""

    operand_bytes: int
    """Hidden states and head weight, each once."""
    logit_bytes: int
    """Passes over the logits (or entropies), reading or writing."""
    gemm_flops: int
    vector_flops: int


@dataclass(frozen=True)
class Workload:
    """One function at one shape, forward or forward and backward."""

    function: str
    rows: int
    """Rows of logits, or trajectories."""
    columns: int
    """Vocabulary, or steps of a trajectory."""
    dtype: torch.dtype = torch.bfloat16
    dim: int = 0
    """Width of the hidden states, where the function starts from them."""
    kl: str | None = None
    backward: bool = False
    k: int = 8
    """Steps to select."""

    @property
    def selects(self) -> bool:
        return self.function.startswith("select_steps")

    @property
    def linear(self) -> bool:
        return self.function.startswith("linear")

    @property
    def surrogate(self) -> bool:
        return self.function.endswith("surrogate")

    @property
    def leaf(self) -> str:
        """The input that the gradient is taken of."""
        return "hidden" if self.linear else "logits"

    @property
    def steps(self) -> int:
        return max(1, self.rows // TOKENS_PER_STEP)

    @property
    def pass_name(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def shape(self) -> str:
        if self.selects:
            return f"{self.rows}x{self.columns} k={self.k}"
        return f"{self.rows}x{f'{self.dim}x' if self.dim else ''}{self.columns}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        name = self.function + (f"[{self.kl}]" if self.kl else "")
        return f"{name} {self.pass_name} {self.shape} {self.dtype_name}"


def workloads(device: str) -> list[Workload]:
    """The suite for ``"cuda"``, or the reduced one for ``"cpu"``."""
    if device == "cpu":
        return _suite(
            stats=[8, 32],
            sample=[4],
            linear=[8],
            surrogate=[8],
            linear_surrogate=[8],
            dim=128,
            selection=[(16, 128), (64, 256)],
            linear_dtype=torch.float32,
        )
    return _suite(
        stats=[32, 128, 256, 512, 2048, 16384],
        sample=[32, 128, 256, 512, 2048, 16384],
        linear=[128, 256, 512, 2048, 16384],
        surrogate=[96, 256, 512, 2048, 4096],
        linear_surrogate=[96, 256, 512, 2048, 4096],
        dim=DIM,
        selection=[(16, 128), (64, 256), (1024, 256)],
        linear_dtype=torch.bfloat16,
    )


def _suite(
    stats: list[int],
    sample: list[int],
    linear: list[int],
    surrogate: list[int],
    linear_surrogate: list[int],
    dim: int,
    selection: list[tuple[int, int]],
    linear_dtype: torch.dtype,
) -> list[Workload]:
    suite = [Workload("token_stats", rows, VOCAB) for rows in stats]
    suite += [Workload("sample_tokens", rows, VOCAB) for rows in sample]
    suite += [
        Workload("linear_token_stats", rows, VOCAB, linear_dtype, dim, backward=backward)
        for rows in linear
        # The update, which takes gradients, has at most 4096 rows.
        for backward in ((False, True) if rows <= 4096 else (False,))
    ]
    for function, sizes, dtype, width in (
        ("stepwise_surrogate", surrogate, torch.bfloat16, 0),
        ("linear_stepwise_surrogate", linear_surrogate, linear_dtype, dim),
    ):
        suite += [
            Workload(function, rows, VOCAB, dtype, width, kl, backward)
            for kl in (None, "k3", "exact")
            for rows in sizes
            for backward in (False, True)
            # k3 reads what no KL reads: once, to show it.
            if kl != "k3" or (function == "stepwise_surrogate" and rows == sizes[0] and backward)
        ]
    for function in ("select_steps", "select_steps_segmented"):
        suite += [Workload(function, *shape, torch.float32) for shape in selection]
    return suite


def work_of(workload: Workload) -> Work:
    """Each input read once and each output written once, logits counted as if held in memory."""
    item = workload.dtype.itemsize
    logits = workload.rows * workload.columns
    if workload.selects:
        read = logits * (item + (8 if workload.function.endswith("segmented") else 0))
        return Work(0, read + workload.rows * workload.k * 8, 0, 0)
    passes = 2 if workload.kl == "exact" else 1
    if workload.backward:
        passes = 2 * passes + 1  # the same again, and the gradient written
    operands = gemm = 0
    if workload.linear:
        operands = (workload.columns + workload.rows) * workload.dim * item
        products = 2 if workload.kl == "exact" else 1
        gemm = 2 * logits * workload.dim * (products + workload.backward)
    return Work(operands, passes * logits * item, gemm, passes * logits * _VECTOR_FLOPS)


def floor_seconds(work: Work, ceilings: dict[str, Any], dtype_name: str) -> float:
    """Product, bound by arithmetic or by its operands, then the passes over the logits."""
    bandwidth = ceilings["bytes_per_second"]
    product = max(
        work.gemm_flops / ceilings["flops_per_second"][dtype_name], work.operand_bytes / bandwidth
    )
    return product + work.logit_bytes / bandwidth


def make_inputs(workload: Workload, device: torch.device, seed: int = 0) -> Inputs:
    """Arguments for every implementation, on ``device``."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return (scale * values).to(workload.dtype)

    rows, columns, dim = workload.rows, workload.columns, workload.dim
    if workload.selects:
        ids = torch.randint(columns, (rows, columns), generator=generator, device=device)
        return {"entropy": normal(rows, columns).abs(), "step_ids": ids, "k": workload.k}
    inputs: Inputs = {
        "targets": torch.randint(columns, (rows,), generator=generator, device=device)
    }
    if workload.linear:
        inputs["hidden"] = normal(rows, dim)
        inputs["weight"] = normal(columns, dim, scale=4 / dim**0.5)  # logits of deviation 4
        if workload.kl == "exact":
            inputs["ref_hidden"] = inputs["hidden"] + normal(rows, dim, scale=0.1)
    else:
        inputs["logits"] = normal(rows, columns, scale=4.0)
        if workload.kl == "exact":
            inputs["ref_logits"] = inputs["logits"] + normal(rows, columns, scale=0.4)
    if workload.function == "sample_tokens":
        inputs["row_ids"] = torch.arange(rows, device=device)
    if workload.surrogate:
        inputs |= _step_inputs(workload, inputs, generator)
    if workload.backward:
        inputs[workload.leaf].requires_grad_()
    return inputs


@torch.no_grad()
def _step_inputs(workload: Workload, inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Steps of about four tokens, with ratios on both sides of both clips."""
    device = inputs["targets"].device
    steps = workload.steps
    ids = torch.arange(workload.rows, device=device) * steps // workload.rows
    token = torch.cat(
        [_token_log_prob(inputs, part) for part in torch.arange(workload.rows).split(256)]
    )
    token = token + 0.2 * torch.randn(len(token), generator=generator, device=device)
    counts = torch.zeros(steps, device=device).index_add(0, ids, torch.ones_like(token))
    old = torch.zeros(steps, device=device).index_add(0, ids, token) / counts
    made: Inputs = {
        "step_ids": ids,
        "old_token_log_prob": token,
        "old_log_prob": old,
        "advantage": torch.randn(steps, generator=generator, device=device),
    }
    if workload.kl == "k3":
        made["ref_log_prob"] = old + 0.1 * torch.randn(steps, generator=generator, device=device)
    return made


def _token_log_prob(inputs: Inputs, part: Tensor) -> Tensor:
    rows = slice(int(part[0]), int(part[-1]) + 1)
    if "logits" in inputs:
        scores = inputs["logits"][rows]
    else:
        scores = inputs["hidden"][rows] @ inputs["weight"].t()
    log_probs = torch.log_softmax(scores.float(), -1)
    return log_probs.gather(1, inputs["targets"][rows, None]).squeeze(1)
