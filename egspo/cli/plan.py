"""``egspo plan``."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from egspo.cli.common import AddCommand

_EPILOG = """\
examples:
  egspo plan recipes/llada_8b_sudoku.yaml --gpu-memory 80GB --gpus 8
  egspo plan RECIPE --gpu-memory 24GB model.gradient_checkpointing=true
  egspo plan RECIPE --gpu-memory 24GB --measured runs/short --rates runs/short

exit code: 0 if the recipe fits, 3 if not.
"""
_UNITS = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30}


def add_commands(add: AddCommand) -> None:
    plan = add("plan", "estimate the cost of a recipe and whether it fits a GPU", _plan, _EPILOG)
    plan.add_argument("recipe", metavar="RECIPE", help="YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    plan.add_argument(
        "--gpu-memory", required=True, type=_bytes, metavar="SIZE", help="of one GPU: 24GB, 22.3GiB"
    )
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="default 1")
    shares = plan.add_argument_group("what a run does of the most that the recipe allows")
    shares.add_argument("--measured", type=Path, metavar="RUN", help="as that run measured")
    shares.add_argument(
        "--saved-steps",
        type=float,
        metavar="SHARE",
        help="of the denoising steps, saved by early exit (default 0)",
    )
    shares.add_argument(
        "--scored-states",
        type=float,
        metavar="SHARE",
        help="of prompts x group x selected steps (default 1)",
    )
    shares.add_argument(
        "--trained-states", type=float, metavar="SHARE", help="of the same (default: as scored)"
    )
    rates = plan.add_mutually_exclusive_group()
    rates.add_argument("--tflops", type=float, metavar="X", help="TFLOP/s that one GPU sustains")
    rates.add_argument(
        "--rates",
        type=Path,
        metavar="FILE",
        help='{"rollout": X, "score": X, "update": X} in TFLOP/s, or a run on one such GPU',
    )
    plan.add_argument("--json", action="store_true", help="machine-readable")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]) > 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GB or 22.3GiB, got {text!r}")
    return int(float(match[1]) * unit)


def _plan(args: argparse.Namespace) -> int:
    from egspo.config.recipe import load_config
    from egspo.planning.expected_work import Shares
    from egspo.planning.plan import PHASES, Planner, measured_shares, read_rates
    from egspo.planning.report import as_json, make_report, print_plan

    config = load_config(args.recipe, args.overrides)
    given = (args.saved_steps, args.scored_states, args.trained_states)
    if args.measured is not None and given != (None, None, None):
        raise ValueError(
            "--measured has the shares: leave out --saved-steps, --scored-states, --trained-states"
        )
    if args.tflops is not None and not args.tflops > 0:
        raise ValueError(f"--tflops must be > 0, got {args.tflops}")
    rates = None if args.rates is None else read_rates(args.rates)
    if args.tflops is not None:
        rates = dict.fromkeys(PHASES, args.tflops * 1e12)
    if args.measured is not None:
        shares = measured_shares(args.measured)
    else:
        saved, scored, trained = given
        scored = 1.0 if scored is None else scored
        shares = Shares(
            0.0 if saved is None else saved, scored, scored if trained is None else trained
        )
    report = make_report(Planner(config, args.gpus, shares), args.gpu_memory, rates)
    if args.json:
        print(json.dumps(as_json(report), indent=1))
    else:
        from egspo.inspection.console import PlainConsole

        print_plan(report, PlainConsole())
    return 0 if report.fits else 3
