"""Options of commands that decode with a trained model, and what they name."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from egspo.config import GenerationConfig, Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Decoding options; those not given are absent from the namespace."""
    add = parser.add_argument
    for name, kind, text in (
        ("max-new-tokens", int, "length of the completion"),
        ("steps", int, "denoising steps"),
        ("block-length", int, "tokens denoised together, left to right"),
        ("temperature", float, "0 decodes greedily"),
        ("batch-size", int, "completions denoised together"),
    ):
        metavar = "N" if kind is int else "X"
        add(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)
    policies = get_args(Policy)
    text = "which positions are unmasked first: " + ", ".join(policies)
    add("--policy", choices=policies, default=argparse.SUPPRESS, metavar="NAME", help=text)


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", metavar="PATH_OR_ID", help="LoRA adapter (PEFT), or a run that trained one"
    )


@dataclass(frozen=True)
class NamedModel:
    """What ``--model`` and ``--adapter`` name: folders, or names on the hub."""

    path: str
    adapter: str | None

    @property
    def trained(self) -> str:
        """Where training left its files: the adapter's folder, or the model's."""
        return self.path if self.adapter is None else self.adapter

    def load(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model, in evaluation mode, on the GPU where there is one; and its tokenizer."""
        import torch

        from egspo.models import load_adapter, load_model, load_tokenizer

        model: Any = load_model(self.path)
        has_tokenizer = (Path(self.trained) / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(self.trained if has_tokenizer else self.path, model.config)
        if self.adapter is not None:
            model = load_adapter(model, self.adapter)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def named_model(args: argparse.Namespace) -> NamedModel:
    """Of the options ``model`` and ``adapter``; raises ValueError where they are mixed up."""
    adapter = None if args.adapter is None else weights_folder(args.adapter, "adapter")
    return NamedModel(weights_folder(args.model, "model"), adapter)


def weights_folder(where: str, kind: str) -> str:
    """The folder of a ``model`` or ``adapter``: ``where``, or inside the run or checkpoint there.

    Anything else is returned as it is: a name on the hub.
    """
    other = "adapter" if kind == "model" else "model"
    for name in (kind, other):
        file = "config.json" if name == "model" else "adapter_config.json"
        for candidate in (Path(where), Path(where, name), Path(where, "final", name)):
            if not (candidate / file).is_file():
                continue
            if name == other:
                hint = f"--model BASE --adapter {where}" if kind == "model" else f"--model {where}"
                raise ValueError(
                    f"{where} has no {kind} but the {other} {candidate}: did you mean {hint}?"
                )
            return str(candidate)
    return where


def generation_config(args: argparse.Namespace, folder: str) -> GenerationConfig:
    """Defaults, then what is stored beside the weights, then the command line."""
    from egspo.generation import GENERATION_FILE
    from egspo.recipe import from_mapping

    file = Path(folder) / GENERATION_FILE
    stored = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    given = {f.name: getattr(args, f.name) for f in fields(GenerationConfig) if f.name in args}
    source = "generation options" + (f" (of {file} and the command line)" if stored else "")
    return from_mapping(GenerationConfig, {**stored, **given}, source)
