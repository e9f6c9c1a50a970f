"""``egspo export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from egspo.cli.common import AddCommand

_EPILOG = """\
examples:
  egspo export runs/llada_8b_sudoku --output llada-sudoku
  egspo export runs/llada_8b_sudoku/checkpoints/step-000050 --output llada-sudoku-50
  egspo export ADAPTER --base GSAI-ML/LLaDA-8B-Instruct --output merged
"""


def add_commands(add: AddCommand) -> None:
    export = add(
        "export", "write a trained model as one checkpoint, adapter merged", _export, _EPILOG
    )
    export.add_argument(
        "source", metavar="RUN_OR_ADAPTER", help="a run, a checkpoint of one, or an adapter"
    )
    export.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="new folder for the checkpoint"
    )
    export.add_argument(
        "--base", metavar="MODEL", help="what the adapter was trained on, if not as recorded"
    )
    export.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a weights file, as save_pretrained has it"
    )


def _export(args: argparse.Namespace) -> None:
    from egspo.cli.common import hide_loading_bars
    from egspo.training.export import export

    hide_loading_bars()
    exported = export(
        Path(args.source), args.output, base=args.base, max_shard_size=args.max_shard_size
    )
    if exported.base is not None:
        print(f"base: {exported.base}")
    print(f"model: {exported.folder}")
