"""The CUDA library as a file, and its Python side: nothing here needs a GPU."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from egspo_kernels import (
    UnavailableBackendError,
    last_backend,
    select_steps,
    select_steps_segmented,
    selection,
)
from egspo_kernels.dispatch import extension

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def test_library_is_installed_where_it_is_required() -> None:
    if os.environ.get("EGSPO_REQUIRE_CUDA") != "1":
        pytest.skip("EGSPO_REQUIRE_CUDA is not set")
    extension.load_library(extension.CUDA_LIBRARY_PATH, cuda=True)


@pytest.fixture(scope="module")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as ``pip install`` would build it from these sources (some 10 s)."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("EGSPO_")}
    environment["EGSPO_REQUIRE_CUDA"] = "1"
    command = [sys.executable, "setup.py", "build_ext"]
    command += [f"--build-lib={folder}", f"--build-temp={folder / 'objects'}"]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "egspo_kernels" / extension.CUDA_LIBRARY_PATH.name


def cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow  # builds the library
@needs_nvcc
class TestFile:
    def test_machine_code_and_ptx(self, library_path: Path) -> None:
        listed = re.findall(r"(sm_\w+)\.cubin", cuobjdump("--list-elf", str(library_path)))
        assert set(listed) == set(ARCHITECTURES)
        assert re.findall(r"(sm_\w+)\.ptx", cuobjdump("--list-ptx", str(library_path))) == [
            ARCHITECTURES[-1]
        ]

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_resources(self, library_path: Path, architecture: str) -> None:
        usage = cuobjdump("-res-usage", "-arch", architecture, str(library_path))
        found = re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
        )
        assert len(found) == 8, usage  # two value types, two block shapes, steps or tokens
        for name, *numbers in found:
            registers, stack, shared, local = map(int, numbers)
            assert stack == local == 0, f"{name} spills"
            # 1,024 threads must fit, and no launch may have to ask for shared memory.
            assert registers <= 64, name
            assert shared <= 48 * 1024, name

    def test_needs_no_other_cuda_library(self, library_path: Path) -> None:
        readelf = shutil.which("readelf")
        if readelf is None:
            pytest.skip("no readelf")
        command = [readelf, "-d", str(library_path)]
        dynamic = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
        assert needed
        assert not [name for name in needed if "cuda" in name or "torch" in name]

    @pytest.mark.parametrize("version", ["3.11", "3.12"])
    def test_one_build_serves_every_python(self, library_path: Path, version: str) -> None:
        """Loads without torch, and reports what CUDA says where there is no GPU."""
        python = find_python(version)
        if python is None:
            pytest.skip(f"no Python {version}")
        cpu_library = extension.LIBRARY_PATH
        program = f"""
import ctypes, sys
assert sys.version_info[:2] == {tuple(map(int, version.split(".")))}
if {cpu_library.exists()}:
    assert ctypes.CDLL({str(cpu_library)!r}).egspo_abi_version() == {extension._ABI_VERSION}
library = ctypes.CDLL({str(library_path)!r})
assert library.egspo_abi_version() == {extension._ABI_VERSION}
library.egspo_cuda_error_name.restype = ctypes.c_char_p
print(library.egspo_cuda_error_name(library.egspo_cuda_check()).decode())
"""
        command = [python, "-I", "-c", program]
        ran = subprocess.run(
            command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip() in ("cudaErrorNoDevice", "cudaErrorInsufficientDriver")

    def test_impossible_arguments(self, library_path: Path) -> None:
        library = extension.load_library(library_path, cuda=True)
        good = {"batch": 2, "steps": 4, "row_stride": 4, "limits": None, "k": 2, "indices": 16}
        tokens = {"step_ids": 16, "tokens": 4, "reduce": 0, "workspace": 16}
        for name, values in {
            "batch": (-1, 2**31),
            "steps": (-1, 2**31),
            "tokens": (-1, 2**62),
            "row_stride": (-1, 2**62),
            "k": (-1, 2**31),
            "reduce": (-1, 2),
            "entropy": (None,),
            "step_ids": (None,),
            "indices": (None,),
            "workspace": (None,),
        }.items():
            for value in values:
                a = {"entropy": 16, **good, **tokens, name: value}
                if name not in tokens:
                    status = library.egspo_cuda_select_steps_f32(
                        *(a["entropy"], a["batch"], a["steps"], a["row_stride"]),
                        *(a["limits"], a["k"], a["indices"], None),
                    )
                    assert status == 1, (name, value)
                status = library.egspo_cuda_select_steps_segmented_f64(
                    *(a["entropy"], a["step_ids"], a["batch"], a["tokens"], a["row_stride"]),
                    *(a["steps"], a["reduce"], a["limits"], a["k"], a["indices"]),
                    *(a["workspace"], None),
                )
                assert status == 1, (name, value)

    def test_empty_calls_launch_nothing(self, library_path: Path) -> None:
        library = extension.load_library(library_path, cuda=True)
        for batch, k in ((0, 0), (0, 3), (3, 0)):
            assert library.egspo_cuda_select_steps_f64(None, batch, 0, 0, None, k, None, None) == 0

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_refused_launch_is_named(
        self, library_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        library = extension.load_library(library_path, cuda=True)
        pattern = r"egspo_cuda_select_steps_f32 failed: cudaError\w+: \w+ \w+"
        with pytest.raises(RuntimeError, match=pattern):
            arguments = (16, 1, 1, 1, None, 1, 16, None)
            extension.call_plain(library, "egspo_cuda_select_steps_f32", arguments)


def find_python(version: str) -> str | None:
    """The first interpreter of this version on the path that starts, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    name = f"python{version}"
    for candidate in (shutil.which(name), *map(str, pyenv.glob(f"{version}.*/bin/{name}"))):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None


# ---- Why it cannot run ---------------------------------------------------------------------------


@pytest.fixture
def fresh_probes() -> Iterator[None]:
    caches = (extension.cuda_library, extension.cuda_device_lacks)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def reason() -> str | None:
    """Why the selector cannot run on a GPU; what other functions lack there is not asked."""
    first, second = (
        dispatcher.availability(torch.device("cuda:0"))["cuda"]
        for dispatcher in (selection._SELECT_STEPS, selection._SELECT_STEPS_SEGMENTED)
    )
    assert first == second
    return first


@pytest.mark.usefixtures("fresh_probes")
class TestReasons:
    def test_torch_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert reason() == "this build of torch has no CUDA"

    def test_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert reason() == "torch finds no CUDA device"

    def test_not_built(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        pretend_cuda(monkeypatch)
        monkeypatch.setattr(extension, "CUDA_LIBRARY_PATH", tmp_path / "libegspo_cuda.so")
        expected = "libegspo_cuda.so was not built: no nvcc at installation (reinstall with "
        assert (reason() or "").startswith(expected + "EGSPO_REQUIRE_CUDA=1")

    @pytest.mark.slow  # builds the library
    @needs_nvcc
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    @pytest.mark.slow
    def test_device_that_cannot_run_it(
        self, monkeypatch: pytest.MonkeyPatch, library_path: Path
    ) -> None:
        pretend_cuda(monkeypatch)
        monkeypatch.setattr(extension, "CUDA_LIBRARY_PATH", library_path)
        assert re.fullmatch(r"cudaError\w+: .+", reason() or "")

    def test_other_devices(self) -> None:
        with pytest.raises(
            UnavailableBackendError, match="'cuda' cannot run on cpu: runs on CUDA tensors only"
        ):
            select_steps(torch.rand(2, 3), 1, backend="cuda")

    def test_more_steps_than_it_can_count(self) -> None:
        ids = torch.zeros(1, 1, dtype=torch.int64)
        with pytest.raises(UnavailableBackendError, match="more than 2147483647 rows or steps"):
            select_steps_segmented(torch.rand(1, 1), ids, 2**31, 1, backend="cuda")


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's view of a machine with a GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


# ---- The Python side, on a library with the same interface that runs on the CPU ------------------


@pytest.fixture(scope="module")
def cpu_stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("stand_in") / "libstand_in.so"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{ROOT / 'csrc'}", str(ROOT / "tests/csrc/cuda_on_cpu.cpp"), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.mark.usefixtures("fresh_probes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arguments_reach_the_library(
    monkeypatch: pytest.MonkeyPatch, cpu_stand_in: Path, dtype: torch.dtype
) -> None:
    pretend_cuda(monkeypatch)
    monkeypatch.setattr(extension, "CUDA_LIBRARY_PATH", cpu_stand_in)
    assert reason() is None
    for dispatcher in (selection._SELECT_STEPS, selection._SELECT_STEPS_SEGMENTED):
        for order in ("_on_cpu", "_elsewhere"):
            probes = dict(getattr(dispatcher, order)) | {"cuda": lambda device: None}
            monkeypatch.setattr(dispatcher, order, tuple(probes.items()))
        monkeypatch.setitem(dispatcher._probes, "cuda", lambda device: None)
        monkeypatch.setattr(dispatcher, "_chosen", {})
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(6, 700, generator=generator, dtype=dtype).mul(50).round()[::2, :500]
    limits = torch.tensor([500, 0, 77], dtype=torch.int32)
    step_ids = torch.randint(-1, 90, (3, 500), generator=generator, dtype=torch.int16)
    for k in (0, 1, 8, 90):
        for keywords in ({}, {"limits": limits}):
            selected = select_steps(entropy, k, backend="cuda", **keywords)
            assert last_backend("select_steps") == "cuda"
            assert torch.equal(selected, select_steps(entropy, k, backend="reference", **keywords))
        for reduce in ("mean", "sum"):
            arguments = (entropy, step_ids, 90, k)
            keywords = {"reduce": reduce, "limits": limits.clamp(max=90)}
            selected = select_steps_segmented(*arguments, backend="cuda", **keywords)
            assert last_backend("select_steps_segmented") == "cuda"
            expected = select_steps_segmented(*arguments, backend="reference", **keywords)
            assert torch.equal(selected, expected)
