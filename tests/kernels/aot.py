"""Compiles what a launcher would launch, for GPUs that are not there, and reads the machine code.

Triton's interpreter replaces compilation for a whole process, so this runs in a process of its own:
:func:`compiled` starts one for an architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ARCHITECTURES = (80, 90, 100)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Facts about one compiled variant of a kernel."""

    kernel: str
    registers: int
    """For each thread."""
    spills: int
    """Bytes of local memory for each thread."""
    shared: int
    """Bytes of shared memory for each program."""
    loads: dict[str, int]
    """How many global loads, by width: ``"32"``, ``"v4.32"``, ..."""
    stores: dict[str, int]
    """How many global stores, likewise."""
    read: int
    """Bytes from global memory for each program, by the IR: the dearest way through its branches,
    with every mask open; loops are counted once."""
    written: int
    """Bytes to global memory, likewise."""
    loops: int
    """In the IR."""
    conversions: int
    """Changes of layout in the IR. Those within a thread cost nothing."""
    instructions: int
    """Of the machine code, whether executed or not; loops are counted once."""
    arguments: str
    """Types and specialisations of the arguments."""
    listing: str
    """The machine code, with labels."""


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[dict[str, Compiled]]:
    """Inside, kernels are compiled for ``sm_<capability>`` and not launched; tensors are on CPU.

    Yields:
        filled with the variants compiled, in order, as ``"<kernel>#<number>"``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", capability, 32)
    stub = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    found: dict[str, Compiled] = {}
    seen: set[int] = set()
    run = JITFunction.run

    def compile_(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            number = sum(facts.kernel == self.__name__ for facts in found.values())
            found[f"{self.__name__}#{number}"] = inspect_kernel(self.__name__, kernel)

    with mock.patch.object(JITFunction, "run", compile_):
        previous = driver._active
        driver.set_active(stub)
        try:
            assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
            yield found
        finally:
            driver._active = previous


def inspect_kernel(name: str, kernel: Any) -> Compiled:
    """Reads a compiled kernel with the tools of the Triton wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run(
                [tools / tool, option, cubin.name], capture_output=True, text=True, check=True
            )
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    numbers = {
        key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)
    }
    ptx, ir = kernel.asm["ptx"], kernel.asm["ttgir"]
    return Compiled(
        kernel=name,
        registers=numbers["REG"],
        spills=numbers["STACK"] + numbers["LOCAL"],
        shared=kernel.metadata.shared,
        loads=access_widths("ld", ptx),
        stores=access_widths("st", ptx),
        read=bytes_moved("load", ir),
        written=bytes_moved("store", ir),
        loops=len(re.findall(r"\bscf\.(?:for|while)\b", ir)),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/ (?!\s*NOP)", code.stdout, re.M)),
        conversions=ir.count("ttg.convert_layout"),
        arguments=str(kernel.src.signature) + str(kernel.src.attrs),
        listing=code.stdout,
    )


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


def compiled(script: str, capability: int, timeout: float = 300) -> dict[str, Compiled]:
    """Variants compiled by a script whose launches run inside :func:`compile_only`.

    Args:
        script: Python source that calls launchers with CPU tensors.
        capability: 80, 90, 100, ...
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    result = subprocess.run(
        command, input=script, capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])
    return {name: Compiled(**values) for name, values in facts.items()}


def _main() -> None:
    source, capability = sys.stdin.read(), int(sys.argv[1])
    with compile_only(capability) as found:
        exec(compile(source, "<launches>", "exec"), {"__name__": "launches"})
    print(json.dumps({name: dataclasses.asdict(facts) for name, facts in found.items()}))


if __name__ == "__main__":
    _main()
