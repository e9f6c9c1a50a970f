"""Result files made up for the tests; their numbers are nobody's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def benchmark(
    implementation: str = "egspo triton",
    median: float = 1e-3,
    spread: float = 0.02,
    rows: int = 512,
    **info: Any,
) -> dict[str, Any]:
    """One entry of a result file; ``spread`` is the standard deviation over the median."""
    half = 1.349 * spread / 2
    stats = {"median": median, "q1": median * (1 - half), "q3": median * (1 + half)}
    group = f"token_stats forward {rows}x126464 bfloat16"
    extra = {
        "suite": "kernels",
        "implementation": implementation,
        "function": "token_stats",
        "pass": "forward",
        "kl": None,
        "rows": rows,
        "timing": "graph",
        "errors": {"entropy": 1e-6},
        "peak_bytes": 2**20,
        "bytes_moved": 2 * rows * 126464,
        "flops": 6 * rows * 126464,
        "bytes_per_second": 3.1e12,
        "flops_per_second": 4.2e12,
        "share_of_bandwidth": 0.775,
        "share_of_gemm_rate": 0.0,
        "share_of_floor": 0.775,
    }
    return {"group": group, "stats": stats, "extra_info": {**extra, **info}}


def write(path: Path, *benchmarks: dict[str, Any], gpu: str | None = None, **top: Any) -> Path:
    """A result file of one machine."""
    machine = {
        "command": "pytest benchmarks/ --benchmark-only",
        "commit": "0123456789ab",
        "cpu": "A CPU",
        "gpu": gpu,
        "threads": 4,
        "cores": 8,
        "python": "3.11.7",
        "versions": {"torch": "2.13.0", "trl": None},
    }
    content = {
        "machine_info": machine,
        "ceilings": {
            "bytes_per_second": 4e12,
            "flops_per_second": {"bfloat16": 8e14, "float32": 6e13},
        },
        "load_average": [0.5, 9.0],
        "not_run": {"trl is not installed": ["token_stats forward 8x8 bfloat16 by TRL"]},
        "benchmarks": list(benchmarks),
        **top,
    }
    path.write_text(json.dumps(content))
    return path
