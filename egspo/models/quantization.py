"""What comes from bitsandbytes: a 4-bit frozen base (QLoRA) and 8-bit or paged optimizers."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from egspo.config import OptimizerConfig, TrainConfig

# By their whole names: the suffix ``ff_out`` would be every down-projection of LLaDA too.
_HEADS = ["model.transformer.ff_out", "lm_head"]


def bitsandbytes(option: str) -> ModuleType:
    """The library; raises ValueError naming the ``option`` that needs it where it is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{option} needs bitsandbytes, which is not installed: pip install "
            "'egspo[bitsandbytes]'"
        )
    import bitsandbytes as library

    return library


def check_quantization(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError now, and not after a warm start, where a library or a GPU is missing."""
    if config.model.quantization != "none":
        bitsandbytes(f"model.quantization: {config.model.quantization}")
    optimizer_class(config.optimizer, device)
    if config.sft is not None:
        optimizer_class(config.sft.optimizer, device)


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat weights with quantised scales, for the projections of every block.

    Embedding, norms and the language-model head stay as they are: the kernels use the head's
    weight directly.

    Args:
        dtype: of the products.
    """
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call, unused-ignore]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_HEADS,
    )


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights for inference on a CPU, which has no gradient.

    It does so in evaluation mode, in which policies are trained here.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not declared


def optimizer_class(config: OptimizerConfig, device: torch.device) -> type[torch.optim.Optimizer]:
    """The class that ``optimizer.name`` means; all but SGD take AdamW's arguments.

    Raises:
        ValueError: it needs bitsandbytes, or a GPU, and there is none.
    """
    if config.name == "adamw":
        return torch.optim.AdamW
    if config.name == "sgd":
        return torch.optim.SGD
    library = bitsandbytes(f"optimizer.name: {config.name}")
    if config.name.startswith("paged") and device.type != "cuda":
        raise ValueError(
            f"optimizer.name: {config.name} pages between GPU and host memory, the model is on "
            f"{device.type!r}"
        )
    found: type[torch.optim.Optimizer] = {
        "adamw_8bit": library.optim.AdamW8bit,
        "paged_adamw": library.optim.PagedAdamW,
        "paged_adamw_8bit": library.optim.PagedAdamW8bit,
    }[config.name]
    return found
