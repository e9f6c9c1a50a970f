"""The iteration that is measured: sizes, a model with random weights, prompts and a reward."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

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
from egspo.models import add_lora, model_on_meta, new_config
from egspo.rollouts.denoiser import Denoiser
from egspo.tasks import Example, Reward, Task
from egspo.tasks.prompts import Data, PromptSet
from egspo.training.build import autocast_dtype

PAD, EOS, MASK, UNKNOWN = range(4)
Decoder = Literal["full attention", "dual cache", "block-causal"]
DECODERS: tuple[Decoder, ...] = get_args(Decoder)
"""Of egspo: LLaDA without and with the cache, SDAR of the same sizes."""
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
    decoder: Decoder = "full attention"

    def __post_init__(self) -> None:
        if self.vocabulary <= SPECIAL:
            raise ValueError(f"vocabulary must be > {SPECIAL}, got {self.vocabulary}")
        self.config(stepwise=True)  # whose checks name what does not fit

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
                cache="dual" if self.decoder == "dual cache" else "none",
            ),
            algorithm=AlgorithmConfig(
                group_size=self.group_size,
                selected_steps=self.selected_steps,
                stepwise=stepwise,
                stop_at_eos=False,
                baseline="rank",  # as published code has it
                # As ``auto`` decides at the size of an 8B model.
                one_step="replay" if self.decoder == "block-causal" else "rollout",
                beta=self.beta,
            ),
            optimizer=OptimizerConfig(learning_rate=1e-30),
            prompts_per_step=self.prompts,
            micro_batch_size=self.micro_batch,
        )

    def model_fields(self) -> dict[str, Any]:
        tokens = {
            "vocab_size": self.vocabulary,
            "mask_token_id": MASK,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        longest = self.prompt_tokens + self.new_tokens
        if self.decoder == "block-causal":
            return tokens | {
                "model_type": "sdar",
                "hidden_size": self.d_model,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.heads,
                "head_dim": self.d_model // self.heads,
                "intermediate_size": self.mlp,
                "block_size": self.block_length,
                "max_position_embeddings": longest,
                "initializer_range": self.init_std,
                "bos_token_id": None,
            }
        return tokens | {
            "model_type": "llada",
            "d_model": self.d_model,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "mlp_hidden_size": self.mlp,
            "max_sequence_length": longest,
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
}
"""By name: ``tiny`` is what tests take, ``llada-8b`` the authors' settings with one prompt."""


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
