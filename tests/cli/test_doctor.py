from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from egspo.cli.doctor import diagnose, print_report
from egspo_kernels import available_backends
from egspo_kernels.dispatch import extension


def printed(report: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=160))
    return stream.getvalue()


def test_report_is_json_and_printable() -> None:
    report = diagnose()
    assert json.loads(json.dumps(report)) == report
    text = printed(report)
    for name, version in report["versions"].items():
        assert name in text
        assert version is None or version in text
    assert report["attention"]["sdpa"] is None


def test_kernels_agree_with_the_dispatcher() -> None:
    kernels = diagnose()["kernels"]["devices"]["cpu"]
    backends = available_backends("cpu")
    assert kernels.keys() == backends.keys()
    for function, entry in kernels.items():
        assert backends[function][entry["auto"]] is None
        assert entry["auto"] not in entry["unusable"]
        assert all(backends[function][name] == why for name, why in entry["unusable"].items())


def test_missing_library_and_fallback_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = extension.LIBRARY_PATH.with_name("absent.so")
    monkeypatch.setattr(extension, "LIBRARY_PATH", missing)
    reasons = {"select_steps": {"cpp": "not [built]", "reference": None}}
    monkeypatch.setattr("egspo_kernels.available_backends", lambda device: reasons)
    monkeypatch.setenv("EGSPO_KERNELS_BACKEND", "reference")
    report = diagnose()
    assert "absent.so was not built" in report["extension"]["error"]
    text = printed(report)
    assert "absent.so was not built" in text
    assert "cpp: not [built]" in text
    assert "EGSPO_KERNELS_BACKEND=reference overrides" in text


@pytest.mark.parametrize("built", [False, True])
def test_cuda_library_that_is_not_loaded_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: bool
) -> None:
    path = tmp_path / "libegspo_cuda.so"
    if built:
        path.touch()
    monkeypatch.setattr(extension, "CUDA_LIBRARY_PATH", path)
    monkeypatch.setattr(extension, "cuda_library", lambda: "torch has no [CUDA]")
    report = diagnose()
    error = "torch has no [CUDA]"
    assert report["cuda_extension"]["error"] == (
        f"{path} is not loaded: {error}" if built else error
    )
    assert f"Compiled CUDA library: none: {report['cuda_extension']['error']}\n" in printed(report)


def test_cuda_library_that_is_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "cuda_library", object)
    report = diagnose()
    assert report["cuda_extension"] == {"path": str(extension.CUDA_LIBRARY_PATH)}
    assert f"Compiled CUDA library: {extension.CUDA_LIBRARY_PATH}\n" in printed(report)


def test_a_broken_torch_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    report = diagnose()
    for part in ("cpu", "gpus", "kernels", "attention"):
        assert "torch" in report[part]["error"], part
    assert report["versions"]["torch"] is not None
    assert printed(report).count("ModuleNotFoundError") >= 4


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    report = diagnose()
    gpu = {"device": "cuda:0", "name": "Some GPU", "memory_gib": 79.2, "capability": "9.0"}
    assert "Some GPU, 79.2 GiB, capability 9.0" in printed({**report, "gpus": [gpu]})


def test_the_sandbox_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    report = diagnose()
    assert "apt-get install bubblewrap" in report["sandbox"]["error"]
    assert "(bubblewrap): cannot run: bubblewrap (bwrap) is not installed" in printed(report)
    assert "(bubblewrap): can run\n" in printed({**report, "sandbox": {}})
