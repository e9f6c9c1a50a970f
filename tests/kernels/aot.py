"""Compiles what a launcher would launch, for GPUs that are not there, and reads the machine code.

Triton's interpreter replaces compilation for a whole process, so this runs in a process of its own:
:func:`compiled` starts one for a target and keeps what it finds on disk.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


class Target(NamedTuple):
    """What Triton compiles for."""

    backend: str
    architecture: int | str
    warp: int = 32


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Facts about one compiled variant of a kernel; those about machine code for NVIDIA's only."""

    kernel: str
    variant: str
    """Another one for other code."""
    shared: int
    """Bytes of shared memory for each program."""
    written: int
    """Bytes to global memory for each program, by the IR: the dearest way through its branches,
    with every mask open; loops are counted once."""
    loops: int
    """In the IR."""
    conversions: int
    """Changes of layout in the IR. Those within a thread cost nothing."""
    arguments: str
    """Types and specialisations of the arguments."""
    loads: dict[str, int] = dataclasses.field(default_factory=dict)
    """How many global loads, by width: ``"32"``, ``"v4.32"``, ..."""
    stores: dict[str, int] = dataclasses.field(default_factory=dict)
    """How many global stores, likewise."""
    registers: int = 0
    """For each thread."""
    spills: int = 0
    """Bytes of local memory for each thread."""
    cubin: str = dataclasses.field(default="", repr=False)
    """The machine code, in base64."""

    @functools.cached_property
    def listing(self) -> str:
        """The machine code, with labels."""
        return _run_tool("nvdisasm", "-c", base64.b64decode(self.cubin))


@contextlib.contextmanager
def compile_only(target: Target) -> Iterator[list[Any]]:
    """Inside, kernels are compiled for a target and not launched; tensors are on CPU.

    Yields:
        filled with what Triton compiled for each launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    gpu = GPUTarget(*target)
    stub = SimpleNamespace(
        get_current_target=lambda: gpu,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    launched: list[Any] = []
    run = JITFunction.run

    def compile_(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with mock.patch.object(JITFunction, "run", compile_):
        previous = driver._active
        driver.set_active(stub)
        try:
            assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
            yield launched
        finally:
            driver._active = previous


def inspect_kernel(kernel: Any) -> Compiled:
    """Reads a compiled kernel; machine code with the tools of the Triton wheel."""
    ir = kernel.asm["ttgir"]
    facts = Compiled(
        kernel=kernel.metadata.name,
        variant=kernel.hash,
        shared=kernel.metadata.shared,
        written=bytes_moved("store", ir),
        loops=len(re.findall(r"\bscf\.(?:for|while)\b", ir)),
        conversions=ir.count("ttg.convert_layout"),
        arguments=str(kernel.src.signature) + str(kernel.src.attrs),
    )
    if kernel.metadata.target.backend != "cuda":
        assert kernel.asm["hsaco"]
        return facts
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    usage = _run_tool("cuobjdump", "-res-usage", cubin)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return dataclasses.replace(
        facts,
        loads=access_widths("ld", ptx),
        stores=access_widths("st", ptx),
        registers=numbers["REG"],
        spills=numbers["STACK"] + numbers["LOCAL"],
        cubin=base64.b64encode(cubin).decode(),
    )


def _run_tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def access_widths(instruction: str, ptx: str) -> dict[str, int]:
    """How many global accesses of each width."""
    widths: dict[str, int] = {}
    pattern = rf"{instruction}\.global[.\w:]*?(?:\.(v\d))?\.[bfus](\d+)"
    for vector, bits in re.findall(pattern, ptx):
        width = f"{vector}.{bits}" if vector else bits
        widths[width] = widths.get(width, 0) + 1
    return widths


def bytes_moved(operation: str, ir: str) -> int:
    """By a program's ``tt.load`` or ``tt.store``; of two branches, the dearer one."""
    # One list for each region that is open: its branches so far, the last one being read.
    regions = [[0]]
    for line in ir.splitlines():
        line = line.rstrip()
        if re.search(r"^\s*\} else \{", line):
            regions[-1].append(0)
        elif line.endswith("{"):
            regions.append([0])
        elif line.strip().startswith("}"):
            branches = regions.pop()
            regions[-1][-1] += max(branches)
        elif f"tt.{operation} " in line:
            count, element = re.findall(r": (?:tensor<([\dx]+)x)?!tt\.ptr<\w*?(\d+)>", line)[-1]
            size = math.prod(int(n) for n in count.split("x")) if count else 1
            regions[-1][-1] += size * int(element) // 8
    assert len(regions) == 1, "unbalanced IR"
    return regions[0][0]


def compiled(launches: Sequence[str], target: Target) -> dict[str, list[Compiled]]:
    """The kernels of each launch, in order.

    Args:
        launches: calls of functions of :mod:`tests.kernels.launches`, as source.

    What is found is kept beside Triton's own cache, for all processes that ask the same.
    """
    import triton

    here = Path(__file__)
    sources = (*sorted(ROOT.glob("egspo_kernels/**/*.py")), here, here.with_name("launches.py"))
    asked = json.dumps([triton.__version__, launches, target]).encode()
    name = hashlib.sha256(b"".join([asked, *(path.read_bytes() for path in sources)])).hexdigest()
    kept = Path(triton.knobs.cache.dir) / "egspo" / f"{name}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits, and reads
        if not kept.exists():
            kept.with_suffix(".new").write_text(_compile(asked), "utf-8")
            kept.with_suffix(".new").rename(kept)
    found = json.loads(kept.read_text("utf-8"))
    variants = {each["variant"]: Compiled(**each) for each in found["variants"]}
    return {
        launch: [variants[each] for each in kernels]
        for launch, kernels in found["launches"].items()
    }


def distinct(kernels: Iterable[list[Compiled]]) -> list[Compiled]:
    """Each variant once."""
    return list({each.variant: each for launch in kernels for each in launch}.values())


def _compile(asked: bytes) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot"],
        input=asked,
        capture_output=True,
        timeout=1200,
        env=environment,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr.decode()[-4000:]
    return result.stdout.decode().splitlines()[-1]


def _main() -> None:
    _, launches, target = json.load(sys.stdin)
    from tests.kernels import launches as functions

    found: dict[str, list[str]] = {}
    variants: dict[str, Compiled] = {}
    with compile_only(Target(*target)) as launched:
        for launch in launches:
            eval(launch, vars(functions))
            for kernel in launched:
                if kernel.hash not in variants:
                    variants[kernel.hash] = inspect_kernel(kernel)
            found[launch] = [kernel.hash for kernel in launched]
            launched.clear()
    facts = [dataclasses.asdict(each) for each in variants.values()]
    print(json.dumps({"launches": found, "variants": facts}))


if __name__ == "__main__":
    _main()
