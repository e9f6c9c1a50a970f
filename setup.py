"""Builds the libraries of ``csrc/`` into the package; everything else is in pyproject.toml.

They are plain C to the outside and need neither torch nor the Python headers: the wheel is tagged
``py3-none-<platform>``. The CPU library needs a C++17 compiler and ninja; the CUDA library needs
nvcc too, and is built wherever there is one, also beside a CPU build of torch. What cannot be built
is left out with a warning.

Environment variables:
    CXX, CXXFLAGS, LDFLAGS: compiler and flags of the CPU library; nvcc takes CXX as host compiler,
        and flags from NVCC_APPEND_FLAGS.
    CUDA_HOME: where nvcc is, in ``bin``; otherwise PATH and /usr/local/cuda are searched.
    EGSPO_CUDA=0: no CUDA library, whether or not there is an nvcc.
    EGSPO_CUDA_ARCHITECTURES: compute capabilities to compile for, as in "90" or "80;90;100", the
        default; the last one also as PTX, for GPUs that are newer.
    EGSPO_REQUIRE_EXTENSION=1, EGSPO_REQUIRE_CUDA=1: fail if the library cannot be built.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
COMPILERS = [["c++"], ["g++"], ["clang++"]]
CXXFLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -pthread -ffp-contract=fast -Wall -Wextra"
# Sources that run only where the processor has these instructions, whatever it is compiled on.
VECTOR_FLAGS = {
    "rows_avx2": "-mavx2 -mfma -mf16c",
    # gcc 12 warns about its own intrinsics.
    "rows_avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl "
    "-mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized",
}
X86 = platform.machine() in ("x86_64", "AMD64")
# The CUDA runtime is linked in: the one torch brings may be of another version, or not on the path.
NVCCFLAGS = (
    "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra -cudart static --threads 0"
)
CUDA_ARCHITECTURES = ("80", "90", "100")


def environment_flag(name: str, default: str = "0") -> bool:
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


REQUIRE_CPU = environment_flag("EGSPO_REQUIRE_EXTENSION")
REQUIRE_CUDA = environment_flag("EGSPO_REQUIRE_CUDA")
if REQUIRE_CUDA and not environment_flag("EGSPO_CUDA", "1"):
    raise SystemExit("EGSPO_REQUIRE_CUDA=1 contradicts EGSPO_CUDA=0")


def environment_words(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def find_compiler() -> list[str]:
    """The C++ compiler, ``$CXX`` or the first of the usual names, as the words of a command."""
    candidates = [environment_words("CXX")] if os.environ.get("CXX") else COMPILERS
    for command in candidates:
        if shutil.which(command[0]):
            return command
    names = ", ".join(command[0] for command in candidates)
    raise CompileError(f"no C++ compiler found (tried {names}): install one or set CXX")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def architecture_flags(nvcc: str) -> list[str]:
    """Machine code for every architecture, and PTX of the last."""
    chosen = re.findall(r"[^\s;,]+", os.environ.get("EGSPO_CUDA_ARCHITECTURES", ""))
    if wrong := [name for name in chosen if not re.fullmatch(r"\d{2,3}[af]?", name)]:
        raise SystemExit(
            f"EGSPO_CUDA_ARCHITECTURES must hold compute capabilities like 90, got {wrong}"
        )
    if not chosen:  # an older nvcc does not know the newest
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        known = listed.split()
        chosen = [name for name in CUDA_ARCHITECTURES if f"compute_{name}" in known]
    if not chosen:
        raise CompileError(f"{nvcc} compiles for none of {CUDA_ARCHITECTURES}")
    targets = [*((name, f"sm_{name}") for name in chosen), (chosen[-1], f"compute_{chosen[-1]}")]
    return [f"-gencode=arch=compute_{name},code={code}" for name, code in targets]


def cpu_commands() -> tuple[list[str], list[str]]:
    """The commands that compile a source and that link the objects."""
    compiler, ldflags = find_compiler(), environment_words("LDFLAGS")
    compile_flags = [*CXXFLAGS.split(), *environment_words("CXXFLAGS")]
    return [*compiler, *compile_flags], [*compiler, *compile_flags, "-shared", *ldflags]


def cuda_commands() -> tuple[list[str], list[str]]:
    nvcc = find_nvcc()
    if nvcc is None:
        raise CompileError("nvcc not found: install the CUDA toolkit or set CUDA_HOME")
    command = [nvcc, *NVCCFLAGS.split(), *architecture_flags(nvcc)]
    if os.environ.get("CXX"):
        command += ["-ccbin", find_compiler()[0]]
    return command, [*command, "-shared"]


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def ninja_file(commands: tuple[list[str], list[str]], sources: list[str], library: Path) -> str:
    """The build description: one object per source, and the library."""
    compile_command, link_command = (shlex.join(command).replace("$", "$$") for command in commands)
    lines = [
        "rule compile",
        f"  command = {compile_command} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link_command} $in -o $out",
    ]
    objects = []
    for source in sources:
        name = Path(source).stem
        objects.append(f"{name}.o")
        lines.append(f"build {objects[-1]}: compile {ninja_escape(str(ROOT / source))}")
        lines.append(f"  flags = {VECTOR_FLAGS.get(name, '') if X86 else ''}")
    lines.append(f"build {ninja_escape(str(library))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildLibrary(build_ext):
    """Builds a plain shared library where setuptools would build a Python extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + SUFFIX

    def build_extension(self, ext: Extension) -> None:
        file = self.get_ext_filename(ext.name)
        if ext is CUDA_LIBRARY and not BUILD_CUDA:
            self.discard(ext, file)
            return
        try:
            self.build_library(ext)
        except CompileError as error:
            self.discard(ext, file)
            if not ext.optional:
                raise
            self.warn(f"installing WITHOUT {Path(file).name}: {error}")

    def discard(self, ext: Extension, file: str) -> None:
        """Remove what an earlier build left: it is not what was asked for now."""
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        if self.editable_mode:
            (ROOT / file).unlink(missing_ok=True)

    def build_library(self, ext: Extension) -> None:
        if sys.platform == "win32":
            raise CompileError("not supported on Windows")
        commands = cuda_commands() if ext is CUDA_LIBRARY else cpu_commands()
        # Without build isolation, ninja may be installed in an environment that is not activated.
        beside_python = str(Path(sys.executable).parent)
        ninja = shutil.which("ninja") or shutil.which("ninja", path=beside_python)
        if ninja is None:
            raise CompileError("ninja not found: pip install ninja")
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(commands, ext.sources, library))
        if subprocess.run([ninja, "-C", str(work)], check=False).returncode != 0:
            raise CompileError("the build failed, see the messages above")


class PlatformWheel(bdist_wheel):
    """The libraries depend on the platform, but on no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# An optional library that was not built is not missed when files are installed.
CPU_LIBRARY = Extension(
    "egspo_kernels.libegspo_cpu",
    sources=[
        "csrc/select_steps_cpu.cpp",
        "csrc/rows_cpu.cpp",
        "csrc/rows_sample.cpp",
        "csrc/rows_baseline.cpp",
        "csrc/rows_avx2.cpp",
        "csrc/rows_avx512.cpp",
    ],
    optional=not REQUIRE_CPU,
)
CUDA_LIBRARY = Extension(
    "egspo_kernels.libegspo_cuda",
    sources=["csrc/select_steps_cuda.cu"],
    optional=not REQUIRE_CUDA,
)
BUILD_CUDA = environment_flag("EGSPO_CUDA", "1") and (find_nvcc() is not None or REQUIRE_CUDA)

setup(
    ext_modules=[CPU_LIBRARY, CUDA_LIBRARY],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
