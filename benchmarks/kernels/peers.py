"""Other libraries, called as their documentation says, for what they have of each function.

Each returns what it computes and no more: a table says which outputs a time is for. Calls that
would overwrite their inputs are told not to, as inputs are used again.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.implementation import Function, Implementation
from benchmarks.kernels.workloads import CLIP, TOKENS_PER_STEP, Inputs, Outputs, Workload

Lacks = Callable[[Workload, torch.device], str | None]


def _needs(distribution: str, *, gpu: bool = True, also: Lacks | None = None) -> Lacks:
    """Why a peer cannot run: not installed, no GPU, or what ``also`` finds."""

    def lacks(workload: Workload, device: torch.device) -> str | None:
        if version_of(distribution) is None:
            return f"{distribution} is not installed"
        if gpu and device.type != "cuda":
            return f"{distribution} needs a GPU for this"
        return also(workload, device) if also is not None else None

    return lacks


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# Liger-Kernel


def _liger_cross_entropy(workload: Workload) -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def call(inputs: Inputs) -> Outputs:
        result = liger_cross_entropy(
            inputs["logits"], inputs["targets"], reduction="none", return_predicted_tokens=True
        )
        return {"log_prob": -result.loss, "argmax": result.predicted_tokens}

    return call


def _liger_linear(workload: Workload) -> Function:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Fused

    def call(inputs: Inputs) -> Outputs:
        nll, entropy = Fused.apply(
            inputs["hidden"], inputs["weight"], inputs["targets"], return_entropy=True
        )
        return {"log_prob": -nll, "entropy": entropy, "loss": nll.sum()}

    return call


def _liger_layout(inputs: Inputs) -> Inputs:
    """[steps, tokens + 1, V]: the last row of each step, which predicts beyond it, is ignored."""
    logits, steps = inputs["logits"], len(inputs["advantage"])
    rows = logits.detach().view(steps, TOKENS_PER_STEP, -1)
    padded = torch.cat([rows, rows[:, :1]], 1).requires_grad_(logits.requires_grad)
    per_step = {n: inputs[n].view(steps, -1) for n in ("targets", "old_token_log_prob")}
    return {"logits": padded, "advantage": inputs["advantage"], **per_step}


def _liger_restore(outputs: Outputs) -> Outputs:
    if "gradient" not in outputs:
        return outputs
    return {**outputs, "gradient": outputs["gradient"][:, :-1].flatten(0, 1)}


def _liger_grpo(workload: Workload) -> Function:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def call(inputs: Inputs) -> Outputs:
        loss, _ = triton_grpo_loss(
            inputs["logits"],
            inputs["old_token_log_prob"],
            None,
            inputs["targets"],
            inputs["advantage"],
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP,
            eps_high=CLIP,
            inplace=False,
            loss_type="grpo",
            importance_sampling_level="sequence",
            reduce=True,
        )
        return {"loss": loss}

    return call


def _only_equal_steps_without_kl(workload: Workload, device: torch.device) -> str | None:
    if workload.kl is not None:
        return "liger-kernel has no KL of a step, only of a token"
    if workload.rows % TOKENS_PER_STEP:
        return "liger-kernel needs steps of equal size"
    return None


# TRL


def _trl_stats(workload: Workload) -> Function:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def call(inputs: Inputs) -> Outputs:
        log_prob, entropy = selective_log_softmax_and_entropy(inputs["logits"], inputs["targets"])
        return {"log_prob": log_prob, "entropy": entropy}

    return call


def _trl_linear(workload: Workload) -> Function:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    def call(inputs: Inputs) -> Outputs:
        log_prob, entropy, *_ = ChunkedLogProbFunction.apply(
            inputs["hidden"],
            inputs["weight"],
            None,
            inputs["targets"],
            1.0,
            CHUNK,
            None,
            1.0,
            ("entropy",),
        )
        return {"log_prob": log_prob, "entropy": entropy, "loss": -log_prob.sum()}

    return call


# Cut Cross-Entropy


def _cce(workload: Workload) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    def call(inputs: Inputs) -> Outputs:
        loss = linear_cross_entropy(
            inputs["hidden"], inputs["weight"], inputs["targets"], reduction="none"
        )
        return {"log_prob": -loss, "loss": loss.sum()}

    return call


# QuACK


def _quack_cross_entropy(workload: Workload) -> Function:
    from quack.cross_entropy import cross_entropy_fwd

    def call(inputs: Inputs) -> Outputs:
        loss, lse = cross_entropy_fwd(inputs["logits"], inputs["targets"], return_lse=True)
        return {"log_prob": -loss, "logsumexp": lse}

    return call


def _quack_linear(workload: Workload) -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def call(inputs: Inputs) -> Outputs:
        return {
            "loss": chunked_linear_cross_entropy(
                inputs["hidden"], inputs["weight"], inputs["targets"], reduction="sum"
            )
        }

    return call


def _quack_topk(workload: Workload) -> Function:
    from quack.topk import topk_fwd

    return lambda inputs: {"selected": topk_fwd(inputs["entropy"], inputs["k"])[1]}


def _powers_of_two(workload: Workload, device: torch.device) -> str | None:
    sizes = (workload.columns, workload.k)
    fits = all(math.log2(size).is_integer() for size in sizes) and workload.columns <= 4096
    return None if fits else "quack-kernels needs powers of two, at most 4096 steps"


# Step selection


def _torch_topk(workload: Workload) -> Function:
    def call(inputs: Inputs) -> Outputs:
        return {"selected": torch.topk(inputs["entropy"], inputs["k"]).indices}

    return call


def _flashinfer_topk(workload: Workload) -> Function:
    from flashinfer.topk import TopKTieBreak, top_k

    def call(inputs: Inputs) -> Outputs:
        _, indices = top_k(
            inputs["entropy"],
            inputs["k"],
            sorted=True,
            deterministic=True,
            tie_break=TopKTieBreak.SMALL,
        )
        return {"selected": indices}

    return call


def _flashinfer_sample(workload: Workload) -> Function:
    from flashinfer.sampling import sampling_from_logits

    def call(inputs: Inputs) -> Outputs:
        token: Tensor = sampling_from_logits(inputs["logits"])
        return {"token": token}

    return call


_STATS, _LINEAR, _SURROGATE = ("token_stats",), ("linear_token_stats",), ("stepwise_surrogate",)
_SELECT, _SAMPLE = ("select_steps",), ("sample_tokens",)

LIGER, TRL, CCE = "liger-kernel", "trl", "cut-cross-entropy"
QUACK, FLASHINFER = "quack-kernels", "flashinfer-python"
DISTRIBUTIONS = (LIGER, TRL, CCE, QUACK, FLASHINFER)

PEERS = [
    Implementation("Liger-Kernel", _STATS, _liger_cross_entropy, _needs(LIGER)),
    # Its plain PyTorch path, where there is no kernel for the device.
    Implementation("Liger-Kernel", _LINEAR, _liger_linear, _needs(LIGER, gpu=False)),
    Implementation(
        "Liger-Kernel",
        _SURROGATE,
        _liger_grpo,
        _needs(LIGER, also=_only_equal_steps_without_kl),
        _liger_layout,
        _liger_restore,
    ),
    Implementation("TRL", _STATS, _trl_stats, _needs(TRL, gpu=False)),
    Implementation("TRL", _LINEAR, _trl_linear, _needs(TRL, gpu=False)),
    Implementation("Cut Cross-Entropy", _LINEAR, _cce, _needs(CCE)),
    Implementation("QuACK", _STATS, _quack_cross_entropy, _needs(QUACK)),
    Implementation("QuACK", _LINEAR, _quack_linear, _needs(QUACK)),
    Implementation("QuACK", _SELECT, _quack_topk, _needs(QUACK, also=_powers_of_two)),
    Implementation("torch.topk", _SELECT, _torch_topk, lambda workload, device: None),
    Implementation("FlashInfer", _SELECT, _flashinfer_topk, _needs(FLASHINFER)),
    Implementation("FlashInfer", _SAMPLE, _flashinfer_sample, _needs(FLASHINFER)),
]
