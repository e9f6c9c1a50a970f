"""Options of commands that decode with a trained model, and what they name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from egspo.config import GenerationConfig

if TYPE_CHECKING:
    from egspo.serving.named_model import NamedModel


_HELP = {
    "max_new_tokens": "length of the completion",
    "steps": "denoising steps, at most",
    "block_length": "tokens denoised together, left to right",
    "temperature": "0 decodes greedily",
    "policy": "which positions are unmasked first",
    "cache": "keys and values made once per block",
    "guidance": "strength of classifier-free guidance; 0 for none",
    "threshold": "also reveal every position that scores at least this",
    "max_tokens_per_step": "the most that a step reveals with a threshold",
    "early_exit": "stop after the block with the first end of text",
    "batch_size": "completions denoised together",
    "cuda_graphs": "replay a step's forward pass as a CUDA graph",
}


def add_generation_arguments(
    parser: argparse.ArgumentParser, *, without: Sequence[str] = ()
) -> None:
    """An option for every field of GenerationConfig; those not given leave no attribute.

    Args:
        without: fields that the command decides otherwise.
    """
    group = parser.add_argument_group(
        "decoding",
        "options left out are those the model was trained with (egspo_generation.json\n"
        "beside its weights), or else a recipe's defaults",
    )
    for name, kind in get_type_hints(GenerationConfig).items():
        if name in without:
            continue
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _HELP[name]}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            choices = get_args(kind)
            options |= {"choices": choices, "metavar": "NAME"}
            options["help"] += f": {', '.join(choices)}"
        elif type(None) in get_args(kind):
            (kind,) = (option for option in get_args(kind) if option is not type(None))
            options |= {"type": _or_none(kind), "metavar": f"{_METAVARS[kind]}|none"}
        else:
            options |= {"type": kind, "metavar": _METAVARS[kind]}
        group.add_argument(f"--{name.replace('_', '-')}", **options)


_METAVARS = {int: "N", float: "X"}


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "none" else kind(text)

    parse.__name__ = getattr(kind, "__name__", "value")  # argparse: "invalid float value"
    return parse


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", metavar="PATH_OR_ID", help="LoRA adapter (PEFT), or a run that trained one"
    )


def named_model(args: argparse.Namespace) -> NamedModel:
    """Of the options ``model`` and ``adapter``; raises ValueError where they are mixed up."""
    from egspo.serving.named_model import NamedModel, weights_folder

    adapter = None if args.adapter is None else weights_folder(args.adapter, "adapter")
    return NamedModel(weights_folder(args.model, "model"), adapter)


def given_generation(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of GenerationConfig that stand on the command line."""
    return {f.name: getattr(args, f.name) for f in fields(GenerationConfig) if f.name in args}
