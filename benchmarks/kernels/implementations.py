"""Who is measured: this project by backend, plain PyTorch, torch.compile of it, and the peers."""

from __future__ import annotations

import os
from typing import Any

import torch

import egspo_kernels
from benchmarks.kernels import eager, peers
from benchmarks.kernels.implementation import Function, Implementation
from benchmarks.kernels.workloads import BETA, CLIP, Inputs, Outputs, Workload

EVERY_FUNCTION = tuple(eager.FUNCTIONS)
OURS = "egspo"


def implementations(device: str) -> list[Implementation]:
    """All that exist for a kind of device, installed or not."""
    backends = ("triton", "cuda") if device == "cuda" else ("triton", "cpp", "reference")
    own = [_own(backend) for backend in backends]
    return [*own, _EAGER, _COMPILED, *peers.PEERS]


def _own(backend: str) -> Implementation:
    listing = egspo_kernels.available_backends()
    return Implementation(
        name=f"{OURS} {backend}",
        functions=tuple(name for name in EVERY_FUNCTION if backend in listing[name]),
        build=lambda workload: _own_call(workload, backend),
        lacks=lambda workload, device: _backend_lacks(workload, device, backend),
    )


def _backend_lacks(workload: Workload, device: torch.device, backend: str) -> str | None:
    if backend == "triton" and device.type == "cpu":
        # TRITON_INTERPRET=1 makes it run here; the interpreter's time says nothing.
        return "the triton backend needs a GPU; Triton's interpreter is not timed"
    return egspo_kernels.available_backends(device)[workload.function][backend]


def _own_call(workload: Workload, backend: str) -> Function:
    function = getattr(egspo_kernels, workload.function)
    options: dict[str, Any] = {"backend": backend}
    if workload.surrogate:
        options |= {"clip_low": CLIP, "clip_high": CLIP, "aggregation": "mean", "kl": workload.kl}
        options["beta"] = BETA if workload.kl else 0.0

    def token_stats(inputs: Inputs) -> Outputs:
        return function(inputs["logits"], inputs["targets"], **options)._asdict()

    def sample_tokens(inputs: Inputs) -> Outputs:
        sampled = function(
            inputs["logits"], temperature=1.0, seed=0, step=0, row_ids=inputs["row_ids"], **options
        )
        return sampled._asdict()

    def linear_token_stats(inputs: Inputs) -> Outputs:
        stats = function(inputs["hidden"], inputs["weight"], inputs["targets"], **options)
        return {**stats._asdict(), "loss": -stats.log_prob.sum()}

    def steps(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return tuple(inputs[n] for n in ("targets", "step_ids", "old_log_prob", "advantage"))

    def stepwise_surrogate(inputs: Inputs) -> Outputs:
        reference = {n: inputs[n] for n in ("ref_logits", "ref_log_prob") if n in inputs}
        result = function(inputs["logits"], *steps(inputs), **reference, **options)
        return _surrogate_outputs(result, workload)

    def linear_stepwise_surrogate(inputs: Inputs) -> Outputs:
        reference = {n: inputs[n] for n in ("ref_hidden", "ref_log_prob") if n in inputs}
        operands = inputs["hidden"], inputs["weight"]
        result = function(*operands, *steps(inputs), **reference, **options)
        return _surrogate_outputs(result, workload)

    def select_steps(inputs: Inputs) -> Outputs:
        return {"selected": function(inputs["entropy"], inputs["k"], **options)}

    def select_steps_segmented(inputs: Inputs) -> Outputs:
        steps = inputs["entropy"].shape[1]
        selected = function(inputs["entropy"], inputs["step_ids"], steps, inputs["k"], **options)
        return {"selected": selected}

    chosen: Function = locals()[workload.function]

    def checked(inputs: Inputs) -> Outputs:
        outputs = chosen(inputs)
        ran = egspo_kernels.last_backend(workload.function)
        if ran != backend:
            raise RuntimeError(f"{workload.function} ran {ran!r}, expected {backend!r}")
        return outputs

    return checked


def _surrogate_outputs(result: egspo_kernels.Surrogate, workload: Workload) -> Outputs:
    outputs = {"loss": result.loss, "log_prob": result.log_prob}
    return {**outputs, "kl": result.kl} if workload.kl else outputs


def _compile(workload: Workload) -> Function:
    # Shapes compiled before count against a limit, beyond which torch runs uncompiled.
    torch.compiler.reset()
    return torch.compile(eager.FUNCTIONS[workload.function], dynamic=False, fullgraph=True)


def _compile_lacks(workload: Workload, device: torch.device) -> str | None:
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE=1"
    return None


_EAGER = Implementation(
    "eager",
    EVERY_FUNCTION,
    lambda workload: eager.FUNCTIONS[workload.function],
    lambda workload, device: None,
)
_COMPILED = Implementation("torch.compile", EVERY_FUNCTION, _compile, _compile_lacks)
