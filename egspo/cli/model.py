"""Options of commands that decode with a trained model, and what they name."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from egspo.config import GenerationConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


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


# With the tokens of a step, what makes two decoders of one model two policies.
_POLICY = ("block_length", "policy", "cache", "guidance", "threshold", "max_tokens_per_step")
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


@dataclass(frozen=True)
class NamedModel:
    """What ``--model`` and ``--adapter`` name: folders, or names on the hub."""

    path: str
    adapter: str | None

    @property
    def trained(self) -> str:
        """Where training left its files: the adapter's folder, or the model's."""
        return self.path if self.adapter is None else self.adapter

    def load(self, device: torch.device | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model in evaluation mode, and its tokenizer.

        Args:
            device: None for the GPU where there is one.
        """
        import torch

        from egspo.models import load_adapter, load_model, load_tokenizer

        model: Any = load_model(self.path)
        has_tokenizer = (Path(self.trained) / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(self.trained if has_tokenizer else self.path, model.config)
        if self.adapter is not None:
            model = load_adapter(model, self.adapter)
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(device).eval(), tokenizer


def named_model(args: argparse.Namespace) -> NamedModel:
    """Of the options ``model`` and ``adapter``; raises ValueError where they are mixed up."""
    adapter = None if args.adapter is None else weights_folder(args.adapter, "adapter")
    return NamedModel(weights_folder(args.model, "model"), adapter)


def weights_folder(where: str, kind: str, *, option: str = "--model ") -> str:
    """The folder of a ``model`` or ``adapter``: ``where``, or inside the run or checkpoint there.

    Anything else is returned as it is: a name on the hub. ``option`` is what stands before a model
    on the command line.
    """
    other = "adapter" if kind == "model" else "model"
    for name in (kind, other):
        file = "config.json" if name == "model" else "adapter_config.json"
        for candidate in (Path(where), Path(where, name), Path(where, "final", name)):
            if not (candidate / file).is_file():
                continue
            if name == other:
                own = f"{option}{where}" if kind == "adapter" else f"{option}BASE --adapter {where}"
                raise ValueError(
                    f"{where} has no {kind} but the {other} {candidate}: did you mean {own}?"
                )
            return str(candidate)
    return where


def generation_config(args: argparse.Namespace, folder: str) -> GenerationConfig:
    """Defaults, then what is stored beside the weights, then the command line.

    A note on standard error says where the command line leaves the policy that was trained.
    """
    from egspo.generation import GENERATION_FILE
    from egspo.recipe import from_mapping

    file = Path(folder) / GENERATION_FILE
    stored = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    given = {f.name: getattr(args, f.name) for f in fields(GenerationConfig) if f.name in args}
    source = "generation options" + (f" (of {file} and the command line)" if stored else "")
    config = from_mapping(GenerationConfig, {**stored, **given}, source)
    if stored:
        trained = from_mapping(GenerationConfig, stored, str(file))
        changes = _policy_changes(trained, config)
        if changes:
            listed = ", ".join(changes)
            print(
                f"egspo: note: this is not the policy that was trained: {listed}", file=sys.stderr
            )
    return config


def _policy_changes(trained: GenerationConfig, used: GenerationConfig) -> list[str]:
    """How ``used`` decodes by another policy than ``trained``, as ``name old -> new``.

    Lengths and temperature are left out: the policy is trained at one of each, and made to be
    asked for others. What a step sees and how many tokens it reveals is the policy itself.
    """

    def described(config: GenerationConfig) -> dict[str, object]:
        named: dict[str, object] = {name: getattr(config, name) for name in _POLICY}
        return {**named, "tokens per step": config.max_new_tokens / config.steps}

    old, new = described(trained), described(used)
    return [
        f"{name} {_short(old[name])} -> {_short(new[name])}"
        for name in old
        if old[name] != new[name]
    ]


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
