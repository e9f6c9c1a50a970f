"""What ``--model`` and ``--adapter`` name, and how it was trained to be decoded."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egspo.config import GenerationConfig
from egspo.config.convert import from_mapping

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GENERATION_FILE = "egspo_generation.json"

# With the tokens of a step, what makes two decoders of one model two policies.
_POLICY = ("block_length", "policy", "cache", "guidance", "threshold", "max_tokens_per_step")


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


def generation_config(given: Mapping[str, Any], folder: str) -> GenerationConfig:
    """Defaults, then what is stored beside the weights in ``folder``, then what is ``given``.

    A note on standard error says where the options given leave the policy that was trained.
    """
    file = Path(folder) / GENERATION_FILE
    stored = _stored(file) if file.is_file() else {}
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


def _stored(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{file} has no options, it is {type(stored).__name__}")
    return stored


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


def save_generation_config(config: GenerationConfig, folder: Path) -> None:
    """Keep beside the weights how the model was trained to be decoded."""
    (folder / GENERATION_FILE).write_text(json.dumps(asdict(config), indent=1))
