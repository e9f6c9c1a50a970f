"""Which files of this machine an interpreter needs: all that a sandbox shows of them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from egspo.sandbox.verdict import SandboxUnavailable

PYTEST_HINT = "tests in pytest's form need pytest and pytest-asyncio: pip install 'egspo[code]'"
_LOADERS = (
    *("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"),
    *("/lib/ld-musl-x86_64.so.1", "/lib/ld-musl-aarch64.so.1"),
)
_OTHERS = ("/usr/share/zoneinfo", "/etc/ld.so.cache", "/usr/lib/locale/C.utf8")
_PACKAGES = (
    *("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "pytest_asyncio"),
    *("typing_extensions", "py"),
)
# Loads every extension module of the standard library but that for windows, and what C libraries
# load on demand.
_LIBRARIES = """
import ctypes, glob, sysconfig
folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
for folder in folders:
    for path in glob.glob(folder + "/lib-dynload/*.so"):
        try: "_tkinter" in path or ctypes.CDLL(path)
        except OSError: pass
for name in ("libc.so.6", "libm.so.6", "libgcc_s.so.1"):
    try: ctypes.CDLL(name)
    except OSError: pass
print("\\n".join(folders))
print("\\n".join({line.split(None, 5)[5].strip() for line in open("/proc/self/maps")
                 if line.count("/")}))
"""


@functools.cache
def interpreter_files() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files and folders to show, at their own place, and folders in them to hide.

    The interpreter and its standard library without what is installed beside it; the libraries
    that they load, by every name that they go by; time zones.
    """
    executable = os.path.realpath(sys.executable)
    options = ["-I", "-S", "-B", "-c", _LIBRARIES]
    loaded = subprocess.run([executable, *options], capture_output=True, text=True, check=True)
    names = loaded.stdout.splitlines()
    folders = {os.path.realpath(name) for name in names if os.path.isdir(name)}
    found = {executable, *folders}
    for name in names:
        if ".so" in os.path.basename(name) and os.path.exists(name):
            found.update(_names(Path(name)))
    for loader in filter(os.path.exists, _LOADERS):
        folder = os.path.realpath(os.path.dirname(loader))
        found.add(os.path.join(folder, os.path.basename(loader)))
    found.update(filter(os.path.exists, _OTHERS))
    hidden = {os.path.join(f, name) for f in folders for name in ("site-packages", "dist-packages")}
    inside = tuple(f"{folder}/" for folder in folders)
    shown = sorted(path for path in found if not path.startswith(inside))
    return tuple(shown), tuple(sorted(filter(os.path.isdir, hidden)))


def _names(library: Path) -> set[str]:
    """A file and the links to it beside it: ``libz.so.1.2.13`` is asked for as ``libz.so.1``."""
    stem = library.name.partition(".so")[0]
    links = library.parent.glob(f"{stem}*.so*")
    return {str(library), *(str(link) for link in links if link.resolve() == library.resolve())}


@functools.cache
def pytest_packages() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files of pytest and what it needs, and the folders to import them from.

    Raises:
        SandboxUnavailable: it is not installed.
    """
    files: list[str] = []
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SandboxUnavailable(f"{PYTEST_HINT} ({name} is missing)")
        origin = Path(os.path.realpath(spec.origin))
        files.append(str(origin.parent if origin.name == "__init__.py" else origin))
    plugin = importlib.metadata.distribution("pytest-asyncio")  # it asks for its own version
    metadata = next(file for file in plugin.files or () if file.name == "METADATA")
    files.append(os.path.realpath(os.path.dirname(str(plugin.locate_file(metadata)))))
    return tuple(files), tuple(dict.fromkeys(os.path.dirname(file) for file in files))
