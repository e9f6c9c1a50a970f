"""``egspo options``."""

from __future__ import annotations

import argparse
import textwrap

from egspo.cli.common import AddCommand

_IN = "      "

_EPILOG = """\
examples:
  egspo options                 every section
  egspo options algorithm       one of them
  egspo options model.lora
"""


def add_commands(add: AddCommand) -> None:
    command = add("options", "list what a recipe can set", _options, _EPILOG)
    command.add_argument("section", nargs="?", metavar="SECTION", help="for example algorithm")
    command.add_argument(
        "--markdown", action="store_true", help="all of them, as the page docs/options.md"
    )


def _options(args: argparse.Namespace) -> None:
    from egspo.config.describe import chosen_sections, to_markdown

    if args.markdown:
        if args.section is not None:
            raise ValueError(f"--markdown prints every section: leave out {args.section}")
        print(to_markdown(), end="")
        return
    for section in chosen_sections(args.section):
        print(f"{section.path or 'the run'}: {_plain(section.text)}\n")
        for option in section.options:
            default = f"default {option.default}" if option.default else "required"
            print(f"  {option.path}: {option.kind}, {default}")
            print(textwrap.fill(_plain(option.text), 92, initial_indent=_IN, subsequent_indent=_IN))
        print()


def _plain(text: str) -> str:
    return text.replace("``", "`")
