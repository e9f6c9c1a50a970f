"""The functions in plain PyTorch, as one would write them, and the float64 truth made of them.

Half precision is computed in float32. These are what ``torch.compile`` compiles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.workloads import BETA, CLIP, Inputs, Outputs, Workload


def _scores(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _gather(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, None]).squeeze(1)


def token_stats(inputs: Inputs) -> Outputs:
    scores = _scores(inputs["logits"])
    log_probs = torch.log_softmax(scores, -1)
    probs = log_probs.exp()
    confidence, argmax = probs.max(-1)
    return {
        "logsumexp": scores.logsumexp(-1),
        "entropy": -(probs * log_probs).sum(-1),
        "log_prob": _gather(log_probs, inputs["targets"]),
        "argmax": argmax,
        "confidence": confidence,
    }


def sample_tokens(inputs: Inputs) -> Outputs:
    log_probs = torch.log_softmax(_scores(inputs["logits"]), -1)
    probs = log_probs.exp()
    token = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
    log_prob = _gather(log_probs, token)
    return {
        "token": token,
        "log_prob": log_prob,
        "confidence": log_prob.exp(),
        "entropy": -(probs * log_probs).sum(-1),
    }


def linear_token_stats(inputs: Inputs) -> Outputs:
    stats = token_stats({**inputs, "logits": inputs["hidden"] @ inputs["weight"].t()})
    return {**stats, "loss": -stats["log_prob"].sum()}


def stepwise_surrogate(inputs: Inputs) -> Outputs:
    log_probs = torch.log_softmax(_scores(inputs["logits"]), -1)
    ids, old, advantage = inputs["step_ids"], inputs["old_log_prob"], inputs["advantage"]

    def per_step(values: Tensor) -> Tensor:
        totals = torch.zeros(len(old), dtype=values.dtype, device=values.device)
        counts = torch.zeros_like(totals).index_add(0, ids, torch.ones_like(values))
        return totals.index_add(0, ids, values) / counts

    log_prob = per_step(_gather(log_probs, inputs["targets"]))
    ratio = (log_prob - old).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    outputs = {"log_prob": log_prob}
    if "ref_logits" in inputs:
        ref_log_probs = torch.log_softmax(_scores(inputs["ref_logits"]), -1)
        outputs["kl"] = per_step((log_probs.exp() * (log_probs - ref_log_probs)).sum(-1))
    elif "ref_log_prob" in inputs:
        difference = inputs["ref_log_prob"] - log_prob
        outputs["kl"] = difference.exp() - difference - 1
    if "kl" in outputs:
        loss = loss + BETA * outputs["kl"]
    return {**outputs, "loss": loss.mean()}


def linear_stepwise_surrogate(inputs: Inputs) -> Outputs:
    made = {"logits": inputs["hidden"] @ inputs["weight"].t()}
    if "ref_hidden" in inputs:
        with torch.no_grad():
            made["ref_logits"] = inputs["ref_hidden"] @ inputs["weight"].t()
    return stepwise_surrogate({**inputs, **made})


def select_steps(inputs: Inputs) -> Outputs:
    order = inputs["entropy"].argsort(dim=-1, descending=True, stable=True)
    return {"selected": order[:, : inputs["k"]]}


def select_steps_segmented(inputs: Inputs) -> Outputs:
    entropy, ids = inputs["entropy"], inputs["step_ids"]
    totals = torch.zeros_like(entropy, dtype=torch.float64).scatter_add(1, ids, entropy.double())
    counts = torch.zeros_like(totals).scatter_add(1, ids, torch.ones_like(totals))
    means = (totals / counts).nan_to_num(nan=float("-inf"))  # steps without a token
    order = means.argsort(dim=-1, descending=True, stable=True)
    return {"selected": order[:, : inputs["k"]]}


FUNCTIONS = {
    function.__name__: function
    for function in (
        token_stats,
        sample_tokens,
        linear_token_stats,
        stepwise_surrogate,
        linear_stepwise_surrogate,
        select_steps,
        select_steps_segmented,
    )
}

TRUTH_ROWS = 64
"""Rows that are computed in float64 too, where rows do not depend on each other."""


def truth(workload: Workload, inputs: Inputs, outputs: Outputs) -> Outputs:
    """The outputs in float64; statistics of a sample are those of the token that was drawn."""
    exact = dict(inputs)
    if not workload.surrogate and not workload.selects:
        for name in exact.keys() & {"hidden", "logits", "targets"}:
            exact[name] = exact[name][:TRUTH_ROWS]
    for name, value in exact.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            exact[name] = value.detach().double()
    if workload.function == "sample_tokens":
        stats = token_stats({**exact, "targets": outputs["token"][:TRUTH_ROWS].long()})
        confidence = stats["log_prob"].exp()
        return {**stats, "confidence": confidence}
    if workload.backward:
        exact[workload.leaf].requires_grad_()
    return run(FUNCTIONS[workload.function], workload, exact)


def run(function: Callable[[Inputs], Outputs], workload: Workload, inputs: Inputs) -> Outputs:
    """Outputs, and the gradient of the loss where the workload has a backward pass."""
    if not workload.backward:
        with torch.no_grad():
            return function(inputs)
    outputs = function(inputs)
    (gradient,) = torch.autograd.grad(outputs["loss"], inputs[workload.leaf])
    return {**outputs, "gradient": gradient}


def errors(workload: Workload, outputs: Outputs, exact: Outputs) -> dict[str, float]:
    """Per output: largest absolute error; of a gradient relative to its largest entry; of indices
    the share that differs."""
    found = {}
    for name in sorted(outputs.keys() & exact.keys()):
        value, right = outputs[name].detach(), exact[name].detach()
        value = value[: len(right)] if right.ndim else value
        if not right.is_floating_point():
            found[name] = float((value != right).double().mean())
            continue
        difference = (value.double() - right).abs().amax()
        if name == "gradient":
            difference = difference / right.abs().amax()
        found[name] = float(difference)
    return found
