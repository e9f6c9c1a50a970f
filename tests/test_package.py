from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import egspo
import egspo_kernels
from egspo_kernels.dispatch import extension

ROOT = Path(__file__).resolve().parents[1]
KERNELS = Path(egspo_kernels.__file__).parent


def imported_modules(source: str) -> set[str]:
    """Absolute names of the modules a source file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def test_kernels_never_import_egspo() -> None:
    files = sorted(KERNELS.rglob("*.py"))
    assert len(files) > 5
    for file in files:
        roots = {name.partition(".")[0] for name in imported_modules(file.read_text("utf-8"))}
        assert "egspo" not in roots, file.name


def test_importing_kernels_loads_neither_egspo_nor_transformers() -> None:
    program = "import sys, egspo_kernels; print(*{name.split('.')[0] for name in sys.modules})"
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120
    ).stdout.split()
    assert "egspo_kernels" in output
    assert not {"egspo", "transformers"} & set(output)


@pytest.mark.parametrize("package", [egspo, egspo_kernels])
def test_every_module_imports_and_types_are_published(package: object) -> None:
    folder = Path(package.__file__).parent  # type: ignore[attr-defined]
    assert (folder / "py.typed").is_file()
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        if parts[-1] == "__main__":  # would run the program
            continue
        if parts[-1] == "lm_eval_adapter" and importlib.util.find_spec("lm_eval") is None:
            with pytest.raises(ModuleNotFoundError, match=r"pip install 'egspo\[lm-eval\]'"):
                importlib.import_module(".".join(parts))
            continue
        importlib.import_module(".".join(parts).removesuffix(".__init__"))


def test_public_names_exist() -> None:
    assert all(hasattr(egspo_kernels, name) for name in egspo_kernels.__all__)


def test_library_is_installed_where_it_is_required() -> None:
    if os.environ.get("EGSPO_REQUIRE_EXTENSION") != "1":
        pytest.skip("EGSPO_REQUIRE_EXTENSION is not set")
    assert not isinstance(library := extension.cpu_library(), str), library


def test_abi_versions_of_header_and_package_agree() -> None:
    header = (ROOT / "csrc" / "select_steps.h").read_text("utf-8")
    (version,) = re.findall(r"#define EGSPO_ABI_VERSION (\d+)", header)
    assert int(version) == extension._ABI_VERSION


def test_installed_distribution_describes_this_package() -> None:
    try:
        distribution = importlib.metadata.distribution("egspo")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("egspo is on the path but not installed")
    requirements = distribution.requires or []
    assert "torch>=2.11" in requirements
    assert not any(re.match(r"torch\s*[=<~]", requirement) for requirement in requirements)
    (script,) = distribution.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("egspo", "egspo.cli:main")
    assert callable(script.load())
