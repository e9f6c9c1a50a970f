"""The site is the repository's own Markdown: what lies outside ``docs/`` is brought in here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import egspo
import egspo_kernels

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "gpu.md",
    "csrc/README.md": "csrc.md",
}
"""Pages of the site by their place in the repository."""


def on_files(files: Files, *, config: Any) -> Files:
    for source, target in OUTSIDE.items():
        text = _relinked((ROOT / source).read_text("utf-8"), (ROOT / source).parent)
        files.append(File.generated(config, target, content=text))
    files.append(File.generated(config, "api.md", content=_api()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    if page.file.generated_by is not None:
        return markdown
    return _relinked(markdown, ROOT / "docs")


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings as plain code."""
    return re.sub(
        r":(?:class|func|meth|mod|attr|data):<code>~?([^<]*)</code>", r"<code>\1</code>", html
    )


def _relinked(text: str, folder: Path) -> str:
    """Links of a page that lies in ``folder`` as the site has them; those to code become code."""

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        path = (folder / target).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            return match.group(0)  # strict mode says what is wrong with it
        inside = str(path.relative_to(ROOT))
        if inside in OUTSIDE:
            return f"[{label}]({OUTSIDE[inside]}{anchor})"
        if inside.startswith("docs/"):
            return f"[{label}]({inside.removeprefix('docs/')}{anchor})"
        return f"{label} (`{inside}`)"

    return re.sub(
        r"\[([^\]\n]*(?:\n[^\]\n]*)?)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)", link, text
    )


def _api() -> str:
    """The public names with their docstrings."""
    lines = ["# Python API"]
    homes = {name: f"egspo.{egspo._HOME[name]}" for name in egspo.__all__}
    kernels = {name: getattr(egspo_kernels, name).__module__ for name in egspo_kernels.__all__}
    for package, places in (("egspo", homes), ("egspo_kernels", kernels)):
        lines += ["", f"## {package}", ""]
        for name, module in places.items():
            lines += [f"### {name}", "", f"::: {module}.{name}", ""]
    return "\n".join(lines) + "\n"
