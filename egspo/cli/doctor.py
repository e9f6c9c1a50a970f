"""What this installation can use, and why not the rest: ``egspo doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import egspo

PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "peft", "datasets"),
    *("flash-attn", "lm-eval", "math-verify"),  # optional
)


def diagnose() -> dict[str, Any]:
    """The report, ready for JSON; a part that fails has ``error`` instead of its content.

    Returns:
        ``versions``: by package, None if not installed. ``cpu``, ``gpus``: devices, memory in
        GiB. ``extension``, ``cuda_extension``: path of the compiled CPU and CUDA library, or why it
        is not used. ``kernels``: by device and function, the backend that ``auto`` picks and why
        others cannot run. ``attention``: by implementation, None if it can run or the reason
        why not. ``sandbox``: ``{}`` if programs of coding tasks can run, or why not.
    """
    return {
        "versions": {
            "egspo": egspo.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "cpu": _guarded(_cpu),
        "gpus": _guarded(_gpus),
        "extension": _guarded(_extension),
        "cuda_extension": _guarded(_cuda_extension),
        "kernels": _guarded(_kernels),
        "attention": _guarded(_attention),
        "sandbox": _guarded(_sandbox),
    }


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Show what :func:`diagnose` found as tables."""
    versions = _table("Versions", "package", "version")
    for name, version in report["versions"].items():
        versions.add_row(name, version or "[dim]not installed[/]")
    console.print(versions)

    _print_devices(report["cpu"], report["gpus"], console)

    for name, part in (("CPU", "extension"), ("CUDA", "cuda_extension")):
        library = report[part]
        found = library.get("path") or f"none: {library['error']}"
        console.print(f"[bold]Compiled {name} library[/]: {escape(found)}", soft_wrap=True)
    console.print()
    _print_kernels(report["kernels"], console)

    sandbox = _error(report["sandbox"])
    found = "can run" if sandbox is None else f"cannot run: {sandbox}"
    console.print(f"[bold]Sandbox for programs[/] (bubblewrap): {found}\n", soft_wrap=True)

    attention = _table("Attention implementations", "name", "status")
    for name, reason in report["attention"].items():
        attention.add_row(name, "[green]available[/]" if reason is None else escape(reason))
    console.print(attention)


def _print_devices(cpu: Mapping[str, Any], gpus: Any, console: Console) -> None:
    table = _table("Devices", "device", "details")
    threads = _error(cpu) or f"{cpu['threads']} threads of {cpu['cores']} cores"
    table.add_row("cpu", threads)
    if _error(gpus) or not gpus:
        table.add_row("gpu", _error(gpus) or "none that torch can use")
    else:
        for gpu in gpus:
            memory, capability = f"{gpu['memory_gib']} GiB", f"capability {gpu['capability']}"
            table.add_row(gpu["device"], f"{gpu['name']}, {memory}, {capability}")
    console.print(table)


def _print_kernels(kernels: Mapping[str, Any], console: Console) -> None:
    if error := _error(kernels):
        console.print(f"[bold]Kernels[/]: {error}\n")
        return
    if kernels["forced"]:
        forced = escape(kernels["forced"])
        console.print(f"[yellow]EGSPO_KERNELS_BACKEND={forced} overrides the choice below[/]")
    for device, functions in kernels["devices"].items():
        table = _table(f"Kernels on {device}", "function", "auto picks", "cannot run, because")
        for function, entry in functions.items():
            reasons = [f"{name}: {reason}" for name, reason in entry["unusable"].items()]
            table.add_row(function, entry["auto"] or "none", escape("\n".join(reasons)) or "-")
        console.print(table)


def _cpu() -> dict[str, Any]:
    import torch

    return {"threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": gpu.name,
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "capability": f"{gpu.major}.{gpu.minor}",
            }
        )
    return found


def _extension() -> dict[str, str]:
    from egspo_kernels.dispatch.extension import LIBRARY_PATH, load_library

    load_library(LIBRARY_PATH)
    return {"path": str(LIBRARY_PATH)}


def _cuda_extension() -> dict[str, str]:
    from egspo_kernels.dispatch.extension import CUDA_LIBRARY_PATH, cuda_library

    library = cuda_library()
    if not isinstance(library, str):
        return {"path": str(CUDA_LIBRARY_PATH)}
    built = CUDA_LIBRARY_PATH.exists()
    return {"error": f"{CUDA_LIBRARY_PATH} is not loaded: {library}" if built else library}


def _kernels() -> dict[str, Any]:
    import torch

    from egspo_kernels import available_backends

    devices: dict[str, Any] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        devices[device] = {}
        for function, backends in available_backends(device).items():
            usable = [name for name, reason in backends.items() if reason is None]
            devices[device][function] = {
                "auto": usable[0] if usable else None,
                "unusable": {name: why for name, why in backends.items() if why is not None},
                "usable": usable,
            }
    return {"forced": os.environ.get("EGSPO_KERNELS_BACKEND"), "devices": devices}


def _attention() -> dict[str, str | None]:
    import torch
    from transformers.utils.import_utils import is_flash_attn_2_available

    reason = None
    if not is_flash_attn_2_available():
        missing = _version("flash-attn") is None
        reason = "flash-attn is not installed" if missing else "flash-attn cannot run here"
        reason = reason if torch.cuda.is_available() else "needs a CUDA device"
    return {"sdpa": None, "eager": None, "flash_attention_2": reason}


def _sandbox() -> dict[str, str]:
    from egspo.sandbox import Bubblewrap, SandboxUnavailable

    backend = Bubblewrap()
    try:
        backend.check()
    except SandboxUnavailable as error:
        return {"error": str(error)}
    finally:
        backend.close()
    return {}


def _guarded(probe: Callable[[], Any]) -> Any:
    """A broken installation is what this command is for: no part may take the others down."""
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _error(part: Any) -> str | None:
    return escape(part["error"]) if isinstance(part, Mapping) and "error" in part else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", title_style="bold")
