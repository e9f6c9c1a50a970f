"""Steps that measure in a process of their own: ``python -m benchmarks.first_gpu.measure NAME``."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import egspo_kernels
from benchmarks.hardware import provenance
from benchmarks.kernels import eager
from benchmarks.kernels.cases import Case, achieved
from benchmarks.kernels.implementation import Implementation
from benchmarks.kernels.implementations import OURS, implementations
from benchmarks.kernels.workloads import VOCAB, Workload, make_inputs, work_of
from benchmarks.timing import Sampler, measure_ceilings, peak_bytes

ROWS = (512, 2048, 128, 16384)
SAMPLES = 7


def ceilings(device: torch.device, folder: Path, rehearse: bool) -> None:
    """``ceilings.json``."""
    found = measure_ceilings(device, tiny=rehearse)
    record = {**provenance("benchmarks.first_gpu"), "ceilings": found}
    (folder / "ceilings.json").write_text(json.dumps(record, indent=1) + "\n")


def smoke(device: torch.device, folder: Path, rehearse: bool) -> None:
    """``smoke.jsonl``: errors of each function against float64, beside those of the reference.

    Raises:
        SystemExit: one is more than four times as far off, or selects other steps.
    """
    wrong = []
    with (folder / "smoke.jsonl").open("w") as out:
        for workload in _workloads((16,), 1000 if rehearse else VOCAB):
            inputs = make_inputs(workload, device)
            named = {i.name: i for i in _ours(device, workload)}
            found = {name: _errors(i, workload, inputs) for name, i in named.items()}
            line = {"workload": workload.id, "errors": found}
            out.write(json.dumps(line) + "\n")
            out.flush()
            wrong += [f"{workload.id}: {text}" for text in _too_far(found)]
    if wrong:
        raise SystemExit("\n".join(wrong))


def _errors(
    implementation: Implementation, workload: Workload, inputs: dict[str, Any]
) -> dict[str, float]:
    outputs = eager.run(implementation.build(workload), workload, inputs)
    return eager.errors(workload, outputs, eager.truth(workload, inputs, outputs))


def _too_far(found: dict[str, dict[str, float]]) -> Iterator[str]:
    plain = found[f"{OURS} reference"]
    for name, errors in found.items():
        for output, error in errors.items():
            bound = 4 * plain[output] + (0 if output in ("selected", "argmax") else 1e-5)
            if not error <= bound:
                yield f"{name}: {output} off by {error:.2g}, the reference by {plain[output]:.2g}"


def kernels(device: torch.device, folder: Path, rehearse: bool) -> None:
    """``kernels.jsonl``: a line for each case, behind those that are there."""
    path = folder / "kernels.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    known = {(line["workload"], line["implementation"]) for line in map(json.loads, lines)}
    found = json.loads((folder / "ceilings.json").read_text())["ceilings"]
    for workload in _workloads((4,) if rehearse else ROWS, 1000 if rehearse else VOCAB):
        for implementation in implementations(device.type):
            key = (workload.id, implementation.name)
            runs = workload.function in implementation.functions and key not in known
            if runs and implementation.lacks(workload, device) is None:
                line = {"workload": key[0], "implementation": key[1]}
                line |= _measured(Case(implementation, workload), device, found)
                with path.open("a") as out:
                    out.write(json.dumps(line) + "\n")
        torch.cuda.empty_cache() if device.type == "cuda" else None


def _measured(case: Case, device: torch.device, found: dict[str, Any]) -> dict[str, Any]:
    try:
        ready = case.ready(device)
        sampler = Sampler(ready.calls, device)
        seconds = statistics.median(sampler.sample() for _ in range(SAMPLES))
        rates = achieved(work_of(case.workload), case.workload, seconds, found)
        peak = peak_bytes(ready.calls[0], device)
    except Exception as error:  # of a peer, or out of memory: the next case still counts
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {
        "seconds": seconds,
        "timing": sampler.method,
        "note": sampler.note,
        "errors": ready.errors,
        "peak_bytes": peak,
        **rates,
    }


def profiled(device: torch.device, folder: Path, rehearse: bool) -> None:
    """``profile.txt``: operations and kernels of the case of ours furthest from its floor."""
    lines = [json.loads(line) for line in (folder / "kernels.jsonl").read_text().splitlines()]
    best = "egspo triton" if device.type == "cuda" else "egspo cpp"
    ours = [x for x in lines if x["implementation"] == best and "share_of_floor" in x]
    if not ours:
        raise SystemExit(f"kernels.jsonl has no case of {best}: run the step `kernels` first")
    worst = min(ours, key=lambda line: line["share_of_floor"])
    rows, vocab = ((4,), 1000) if rehearse else (ROWS, VOCAB)
    (workload,) = [w for w in _workloads(rows, vocab) if w.id == worst["workload"]]
    (implementation,) = [i for i in implementations(device.type) if i.name == best]
    call = Case(implementation, workload).ready(device).calls[0]
    call()
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as record:
        for _ in range(10):
            call()
        if gpu:
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    text = record.key_averages().table(sort_by=order, row_limit=25)
    (folder / "profile.txt").write_text(f"{worst['workload']}, {best}\n{text}\n")


def _ours(device: torch.device, workload: Workload) -> list[Implementation]:
    return [
        implementation
        for implementation in implementations(device.type)
        if implementation.name.startswith(OURS)
        and workload.function in implementation.functions
        and implementation.lacks(workload, device) is None
    ]


def _workloads(rows: tuple[int, ...], vocab: int) -> list[Workload]:
    """Functions in order of value at every number of rows, then the selector."""
    functions = [
        Workload("token_stats", 1, vocab),
        Workload("sample_tokens", 1, vocab),
        Workload("stepwise_surrogate", 1, vocab, kl="exact", backward=True),
        Workload("stepwise_surrogate", 1, vocab, backward=True),
    ]
    sized = [
        replace(workload, rows=count)
        for count in rows
        for workload in functions
        if count <= 4096 or not workload.surrogate
    ]
    return [*sized, Workload("select_steps", 64, 256, torch.float32)]


STEPS = {"ceilings": ceilings, "smoke": smoke, "kernels": kernels, "profile": profiled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu" if args.rehearse else "cuda")
    print(json.dumps(egspo_kernels.available_backends(device), indent=1))
    STEPS[args.step](device, args.folder, args.rehearse)


if __name__ == "__main__":
    main()
