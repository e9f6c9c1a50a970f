"""An HTML file that stands alone: light or dark as its reader is, and nothing is loaded for it."""

from __future__ import annotations

from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #57606a; --page: #fff; --line: #d8dee4;
  --mask: #e6e9ed; --bar: #9fb8cf; --hot: #2f86c5; --pick: #d9772b;
  --good: #2f7d57; --bad: #b8433f }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --page: #0f1419;
  --line: #30363d; --mask: #2b323a; --bar: #4b6a86; --hot: #3b95d6; --pick: #e8964f;
  --good: #58b98a; --bad: #e2736e } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.3rem; margin: 0 } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem }
.soft, th { color: var(--soft); font-weight: normal }
pre, .canvas, .text { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; margin: 0;
  overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem .9rem .2rem 0;
  vertical-align: top; border-bottom: 1px solid var(--line) }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.good { color: var(--good) } .bad { color: var(--bad) }
"""


def html_document(title: str, body: str, *, style: str, script: str | None = None) -> str:
    """A page that may load nothing, and run no script but ``script``.

    Args:
        title: plain text.
        body: HTML, in which every text is escaped.
        style: CSS besides what all pages share.
        script: JavaScript; None forbids all.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    policy += "" if script is None else "; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style></head>\n<body>\n{body}\n"
        + ("" if script is None else f"<script>{script}</script>\n")
        + "</body></html>\n"
    )
