"""The iteration that is measured: sizes, a model with random weights, prompts and a reward."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from egspo.config import (
    AlgorithmConfig,
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
)
from egspo.models import add_lora
from egspo.models.loading import model_on_meta, new_config
from egspo.rollouts.denoiser import Denoiser
from egspo.tasks import Example, Reward, Task
from egspo.tasks.prompts import Data, PromptSet
from egspo.training.build import autocast_dtype

PAD, EOS, MASK, UNKNOWN = range(4)
SPECIAL = 4


@dataclass(frozen=True)
class Problem:
    """Sizes of one iteration. The defaults suit a CPU; see :data:`SIZES`."""

    d_model: int = 128
    layers: int = 2
    heads: int = 4
    mlp: int = 384
    vocabulary: int = 8192
    prompt_tokens: int = 24
    new_tokens: int = 32
    steps: int = 16
    block_length: int = 16
    prompts: int = 1
    group_size: int = 4
    selected_steps: int = 4
    lora_rank: int = 8
    beta: float = 0.04
    rollout_batch: int = 32
    """Sequences denoised together, in both implementations."""
    micro_batch: int = 8
    """States replayed together by egspo; the baseline replays one at a time."""
    init_std: float = 0.1
    dtype: str = "float32"
    """Of the weights; products are bfloat16 on a GPU in either case."""
    checkpointing: bool = False
    family: str = "llada"
    """``llada``, or ``sdar``: block-causal, its blocks those of the generation."""
    queries_per_key: int = 4
    """Of ``sdar``: query heads that share a key and a value head; ``llada`` has one for each."""
    cache: str = "none"
    """Of the keys and values of other blocks, in the rollout: ``none``, ``prefix``, ``dual``."""

    def __post_init__(self) -> None:
        if self.vocabulary <= SPECIAL:
            raise ValueError(f"vocabulary must be > {SPECIAL}, got {self.vocabulary}")
        if self.family not in ("llada", "sdar"):
            raise ValueError(f"family must be 'llada' or 'sdar', got {self.family!r}")
        self.config(stepwise=True)  # whose checks name what does not fit

    @property
    def has_baseline(self) -> bool:
        """Published research code has neither caches nor block-causal models."""
        return self.family == "llada" and self.cache == "none"

    @property
    def sequences(self) -> int:
        return self.prompts * self.group_size

    def config(self, *, stepwise: bool) -> TrainConfig:
        """Of EGSPO-SA, or of EGSPO.

        Every completion is denoised to its end and every step is a candidate: both implementations
        then do the same work whatever the random weights say. The learning rate leaves the weights
        as they are, so that every repetition does the same too.
        """
        return TrainConfig(
            model=ModelConfig(
                config=self.model_fields(),
                lora=LoraConfig(rank=self.lora_rank, alpha=self.lora_rank, dropout=0.0),
                gradient_checkpointing=self.checkpointing,
            ),
            task=TaskConfig(name="spread"),
            generation=GenerationConfig(
                max_new_tokens=self.new_tokens,
                steps=self.steps,
                block_length=self.block_length,
                batch_size=self.rollout_batch,
                early_exit=False,
                cache=self.cache,  # type: ignore[arg-type]
            ),
            algorithm=AlgorithmConfig(
                group_size=self.group_size,
                selected_steps=self.selected_steps,
                stepwise=stepwise,
                stop_at_eos=False,
                baseline="rank",  # as published code has it
                # As ``auto`` decides at the size of an 8B model; a block-causal one has no choice.
                one_step="replay" if self.family == "sdar" else "rollout",
                beta=self.beta,
            ),
            optimizer=OptimizerConfig(learning_rate=1e-30),
            prompts_per_step=self.prompts,
            micro_batch_size=self.micro_batch,
        )

    def model_fields(self) -> dict[str, Any]:
        shared = {
            "vocab_size": self.vocabulary,
            "mask_token_id": MASK,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        if self.family == "sdar":
            return {
                **shared,
                "model_type": "sdar",
                "hidden_size": self.d_model,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": max(self.heads // self.queries_per_key, 1),
                "head_dim": self.d_model // self.heads,
                "intermediate_size": self.mlp,
                "max_position_embeddings": self.prompt_tokens + self.new_tokens,
                "initializer_range": self.init_std,
                "block_size": self.block_length,
            }
        return {
            **shared,
            "model_type": "llada",
            "d_model": self.d_model,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "mlp_hidden_size": self.mlp,
            "max_sequence_length": self.prompt_tokens + self.new_tokens,
            "init_std": self.init_std,
        }

    def denoiser(self, device: torch.device | str) -> Denoiser:
        """A model of these sizes with random weights and a LoRA adapter, whose base is the
        reference policy."""
        config = self.config(stepwise=True)
        model = model_on_meta(new_config(self.model_fields()))
        model.to(getattr(torch, self.dtype)).to_empty(device=device)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, self.init_std, generator=generator)
        return Denoiser(
            self._adapted(model),
            mask_id=MASK,
            eos_id=EOS,
            pad_id=PAD,
            autocast=autocast_dtype(config, torch.device(device)),
        )

    def meta_model(self, *, adapted: bool = True) -> nn.Module:
        """The model without memory for weights: its sizes are what costs are counted from."""
        model = model_on_meta(new_config(self.model_fields()))
        return self._adapted(model) if adapted else model

    def _adapted(self, model: PreTrainedModel) -> nn.Module:
        if self.checkpointing:
            model.checkpoint_activations()
        return add_lora(model, rank=self.lora_rank, alpha=self.lora_rank, dropout=0.0, seed=1)

    def data(self) -> Data:
        """Random prompts of one length, and a reward that hardly ever is the same twice."""
        generator = torch.Generator().manual_seed(2)
        shape = (self.prompts, self.prompt_tokens)
        prompts = torch.randint(SPECIAL, self.vocabulary, shape, generator=generator).tolist()
        message = [{"role": "user", "content": "?"}]
        examples = [Example(message) for _ in prompts]
        task = Task("spread", examples, examples, [Reward("spread", spread)])
        held_out = PromptSet(examples[:1], prompts[:1])
        return Data(task, word_tokenizer(self.vocabulary), PromptSet(examples, prompts), held_out)

    def at_size_of(self, other: Problem) -> Problem:
        """These sequences, steps and states of the model of ``other``."""
        names = ("d_model", "layers", "heads", "mlp", "vocabulary", "lora_rank")
        return replace(self, **{name: getattr(other, name) for name in names})


def spread(completions: Sequence[str], **_: Any) -> list[float]:
    """A number in [0, 1) that any change of the text changes."""
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """``vocabulary`` tokens that are words, the first of them special."""
    words = ["<pad>", "<eos>", "<mask>", "<unk>"]
    words += [f"w{number}" for number in range(SPECIAL, vocabulary)]
    entries = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
    )


LLADA_8B = Problem(
    d_model=4096,
    layers=32,
    heads=32,
    mlp=12288,
    vocabulary=126464,
    prompt_tokens=200,
    new_tokens=256,
    steps=128,
    block_length=32,
    prompts=1,
    group_size=8,
    selected_steps=8,
    lora_rank=128,
    init_std=0.02,
    dtype="bfloat16",
    checkpointing=True,
)
SIZES = {
    "tiny": Problem(d_model=16, layers=2, heads=2, mlp=24, vocabulary=61, init_std=0.3),
    "small": Problem(),
    "llada-8b": LLADA_8B,
    "llada-8b-12": replace(LLADA_8B, group_size=12, rollout_batch=12),
    "llada-8b-dual": replace(LLADA_8B, cache="dual"),
    "sdar-8b": replace(
        LLADA_8B, family="sdar", layers=36, vocabulary=151936, block_length=4, steps=128
    ),
}
"""By name: ``tiny`` is what tests take, ``llada-8b`` the authors' settings with one prompt.
``llada-8b-12`` has the 12 completions of which a step takes 95 s on an H100 by the public figure
that there is, 30 s of them denoising, LoRA of rank 128 there too."""


def changed(problem: Problem, changes: dict[str, Any]) -> Problem:
    """``problem`` with the changes that are not None.

    Raises:
        ValueError: naming an unknown size, or one that does not fit the others.
    """
    names = [f.name for f in fields(Problem)]
    for name in changes:
        if name not in names:
            raise ValueError(f"a problem has no size {name!r}; it has {names}")
    return replace(problem, **{k: v for k, v in changes.items() if v is not None})
