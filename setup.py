"""Builds the CPU library of ``csrc/`` into the package; everything else is in pyproject.toml.

The library is plain C to the outside: it needs a C++17 compiler and ninja, neither torch nor the
Python headers, and the wheel is tagged ``py3-none-<platform>``. Without a compiler the
installation goes on with a warning, unless ``EGSPO_REQUIRE_EXTENSION=1``. ``CXX``, ``CXXFLAGS``
and ``LDFLAGS`` are respected.
"""

import os
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
REQUIRED = os.environ.get("EGSPO_REQUIRE_EXTENSION", "0") == "1"
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
COMPILERS = [["c++"], ["g++"], ["clang++"]]
CXXFLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"


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


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def ninja_file(compiler: list[str], sources: list[str], library: Path) -> str:
    """The build description: one object per source, and the library."""
    variables = {
        "cxx": shlex.join(compiler),
        "cxxflags": f"{CXXFLAGS} {shlex.join(environment_words('CXXFLAGS'))}",
        "ldflags": shlex.join(environment_words("LDFLAGS")),
    }
    lines = [f"{name} = {value.replace('$', '$$')}" for name, value in variables.items()]
    lines += [
        "rule compile",
        "  command = $cxx $cxxflags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $cxxflags -shared $in $ldflags -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(f"{Path(source).stem}.o")
        lines.append(f"build {objects[-1]}: compile {ninja_escape(str(ROOT / source))}")
    lines.append(f"build {ninja_escape(str(library))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildLibrary(build_ext):
    """Builds a plain shared library where setuptools would build a Python extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + SUFFIX

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_library(ext)
        except CompileError as error:
            if REQUIRED:
                raise
            self.warn(
                f"installing WITHOUT the compiled step selector, which will run in PyTorch: {error}"
            )

    def build_library(self, ext: Extension) -> None:
        if sys.platform == "win32":
            raise CompileError("not supported on Windows")
        compiler = find_compiler()
        # Without build isolation, ninja may be installed in an environment that is not activated.
        beside_python = str(Path(sys.executable).parent)
        ninja = shutil.which("ninja") or shutil.which("ninja", path=beside_python)
        if ninja is None:
            raise CompileError("ninja not found: pip install ninja")
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(compiler, ext.sources, library))
        if subprocess.run([ninja, "-C", str(work)], check=False).returncode != 0:
            raise CompileError("the C++ build failed, see the messages above")


class PlatformWheel(bdist_wheel):
    """The library depends on the platform, but on no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "egspo_kernels.libegspo_cpu",
            sources=["csrc/select_steps_cpu.cpp"],
            depends=["csrc/select_steps.h"],
            optional=not REQUIRED,  # nothing to install after a build that failed with a warning
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
