"""What a training run needs of a GPU's memory, estimated from its configuration.

The model is on the meta device: sizes are those of its real modules, adapters included. Tensors
that autograd keeps are counted per token and layer, as ``tests/planning/test_memory.py`` finds them
in the real graph. Left out are what the CUDA context, cuBLAS and the allocator's fragments take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from egspo.config import TrainConfig
from egspo.models.experts import Experts
from egspo.models.lora import is_of_reference
from egspo.models.lora_experts import PROJECTIONS, LoraExperts
from egspo.planning.memory_items import MemoryItem
from egspo.planning.memory_sharded import SHARDED, sharded_weights
from egspo.rollouts.block import LOGITS_BYTES
from egspo_kernels.workspace import DEFAULT_WORKSPACE_BYTES

# A 4-bit weight, its block's scale in 8 bits (64 weights), and that scale's own (256 scales).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Two moments in 8 bits, each with a scale of 4 bytes for 256 of them.
_MOMENTS_8_BIT = 2 * (1 + 4 / 256)

# What the reference backend's statistics take per vocabulary entry of a row; Triton's take less.
_STATISTICS_BYTES = 24


def estimate_memory(
    config: TrainConfig, model: nn.Module, prompt_tokens: int, processes: int = 1
) -> list[MemoryItem]:
    """The parts of the memory of one process.

    Args:
        config: of the run; with the share of this process of the prompts.
        model: on the meta device, in the dtype of its weights, with its adapter.
        prompt_tokens: length of the longest prompt.
        processes: their number, over which a sharded engine divides the weights.
    """
    sizes = Sizes.of(model, compute_bytes(config, model))
    sharded = config.distributed.engine in SHARDED
    return [
        *(sharded_weights(config, model, processes) if sharded else _weights(config, model, sizes)),
        *_update(config, sizes, prompt_tokens),
        *_rollout(config, sizes, prompt_tokens),
    ]


def compute_bytes(config: TrainConfig, model: nn.Module) -> int:
    """Bytes of a number in a matrix product on a GPU: bfloat16, unless the recipe says no."""
    if config.mixed_precision != "no":
        return 2
    return next(model.parameters()).element_size()


@dataclass(frozen=True)
class Sizes:
    """Of a model and one of its layers, all of which are alike."""

    layers: int
    width: int
    mlp: int
    """Width of the gated MLP."""
    query: int
    key: int
    """Width of all query heads, and of all key heads."""
    vocabulary: int
    weight: int
    compute: int
    """Bytes of a weight, and of a number in a matrix product."""
    adapted_inputs: int
    """Summed widths of the inputs of the adapted projections of a layer."""
    ranks: int
    """Summed ranks of their adapters."""
    adapters: bool
    layer_weights: int
    trainable_weights: int
    """Weights of all layers, and of those that are trained."""
    projections: int
    """Weights of the layers' linear projections, adapters left out."""
    blocks: int | None = None
    """Block size of a block-causal model."""

    @classmethod
    def of(cls, model: Any, compute: int) -> Sizes:
        """Of a model with or without adapter, in a dtype whose products take ``compute`` bytes."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config
        layers = list(base.model._layers())
        adapted = [m for m in layers[-1].modules() if hasattr(m, "lora_A")]
        parameters = [
            p
            for layer in layers
            for name, p in layer.named_parameters()
            if not is_of_reference(name)
        ]
        return cls(
            layers=len(layers),
            width=config.hidden_size,
            mlp=_gated_width(layers[-1], config.intermediate_size),
            query=config.num_attention_heads * config.head_dim,
            key=config.num_key_value_heads * config.head_dim,
            vocabulary=base.get_output_embeddings().weight.shape[0],
            weight=base.get_input_embeddings().weight.element_size(),
            compute=compute,
            adapted_inputs=sum(_adapted(m)[0] for m in adapted),
            ranks=sum(
                rank * _adapted(m)[1]
                for m in adapted
                for n, rank in m.r.items()
                if not is_of_reference(n)
            ),
            adapters=any(hasattr(m, "lora_A") for m in base.modules()),
            layer_weights=sum(p.numel() for p in parameters),
            trainable_weights=sum(p.numel() for p in parameters if p.requires_grad),
            projections=sum(
                module.weight.numel()
                for layer in layers
                for name, module in layer.named_modules()
                if isinstance(module, nn.Linear) and "lora_" not in name
            ),
            blocks=getattr(config, "block_size", None),
        )

    def saved_per_token(self) -> int:
        """Bytes that autograd keeps of one token in one layer, without checkpointing."""
        d, f, c = self.width, self.mlp, self.compute
        norm_inputs = 2 * d * 4
        attention = (2 * self.query + 2 * self.key) * c
        gates = 3 * f * c
        if self.adapters:  # each adapted projection keeps its own copy of its input
            return norm_inputs + attention + gates + (self.adapted_inputs + self.ranks) * c
        normed = 2 * d * self.weight  # for the gradient of the norms' scales
        # Where a product has another dtype, each projection keeps its own copy of its input.
        inputs = (2 if self.weight == c else 5) * d * c + f * c
        return norm_inputs + attention + gates + normed + inputs

    def working_per_token(self) -> int:
        """Bytes alive at once of one token in one layer, without gradients."""
        d, c = self.width, self.compute
        attention = 2 * (self.query + self.key) * c + 3 * self.query * 4  # rotated in float32
        return 2 * d * self.weight + d * c + max(3 * self.mlp * c, attention)

    def cast_bytes(self, layers_at_once: int) -> int:
        """Copies of the layers' weights in the dtype of the products.

        Autocast keeps those of trained weights until the update is over; of frozen ones autograd
        keeps what it needs: all layers', or one layer's with checkpointing.
        """
        frozen = self.layer_weights - self.trainable_weights
        copied = 0 if self.weight == self.compute else frozen * layers_at_once // self.layers
        trained_differ = (4 if self.adapters else self.weight) != self.compute
        return self.compute * (copied + self.trainable_weights * trained_differ)


def _adapted(module: Any) -> tuple[int, int]:
    """Of a token: the width of what goes into a module's adapters, and how many it goes through."""
    if not isinstance(module, LoraExperts):
        return module.in_features, 1
    each = 2 * module.in_features + module.out_features  # gate and up, and down
    return module.per_token * each, module.per_token * len(PROJECTIONS)


def _gated_width(layer: nn.Module, dense: int) -> int:
    """Summed widths of the gated MLPs that a token goes through."""
    experts = [m for m in layer.modules() if isinstance(m, Experts)]
    if not experts:
        return dense
    config = experts[0].config
    each = config.moe_intermediate_size
    return int(each * (config.num_experts_per_tok + getattr(config, "num_shared_experts", 0)))


def _weights(config: TrainConfig, model: nn.Module, sizes: Sizes) -> list[MemoryItem]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if not p.requires_grad and not is_of_reference(name)
    )
    trained = sum(p.numel() * p.element_size() for p in trainable)
    items = []
    if config.model.quantization == "nf4":
        four_bit = int(sizes.projections * _NF4_BYTES)
        text = f"{sizes.projections} x {_NF4_BYTES:.3f} B, scales included"
        items.append(MemoryItem("projections in 4 bits", four_bit, text, "always"))
        largest = sizes.width * max(sizes.mlp, sizes.query) * sizes.compute
        items.append(MemoryItem("one projection restored", largest, "for its product", "always"))
        frozen -= sizes.projections * sizes.weight
    if frozen:
        items.append(MemoryItem("frozen weights", frozen, "their number x their bytes", "always"))
    name = "adapters" if sizes.adapters else "weights"
    items.append(MemoryItem(name, trained, "their number x their bytes", "always"))
    if config.algorithm.beta > 0 and not sizes.adapters:
        items.append(MemoryItem("reference policy", frozen + trained, "a frozen copy", "always"))
    second = config.continues_from_reference or config.algorithm.reference_every is not None
    if second and sizes.adapters:
        text = "a second adapter, frozen"
        items.append(MemoryItem("reference adapter", trained, text, "always"))
    items.append(_optimizer(config, sum(p.numel() for p in trainable), trained))
    items.append(MemoryItem("gradients", trained, "trained weights", "update"))
    return items


def _optimizer(config: TrainConfig, count: int, trained: int) -> MemoryItem:
    """Moments of ``count`` trained weights, which take ``trained`` bytes."""
    name = config.optimizer.name
    if name == "sgd":
        held = trained if config.optimizer.betas[0] else 0
        return MemoryItem("optimizer", held, "sgd: momentum x trained weights", "always")
    text = f"{name}: 2 moments x trained weights"
    if name.endswith("8bit"):
        return MemoryItem("optimizer", int(count * _MOMENTS_8_BIT), f"{text}, in 8 bits", "always")
    return MemoryItem("optimizer", 2 * trained, text, "always")


def micro_batch_states(config: TrainConfig, columns: int) -> int:
    """States in a micro-batch, each of which has ``columns`` to compute."""
    algorithm = config.algorithm
    existing = config.prompts_per_step * algorithm.group_size
    existing *= max(map(len, algorithm.update_ranks(config.ranks)))
    if config.micro_batch_tokens is not None:
        return min(existing, max(1, config.micro_batch_tokens // columns))
    assert config.micro_batch_size is not None
    return min(existing, config.micro_batch_size)


def _update(config: TrainConfig, sizes: Sizes, prompt_tokens: int) -> list[MemoryItem]:
    generation = config.generation
    columns = prompt_tokens + generation.max_new_tokens
    text = f"{columns} columns"
    if sizes.blocks is not None:
        return _by_trajectory(config, sizes, sizes.blocks, prompt_tokens)
    if generation.cache != "none":  # a pass for the cache, and one for what a step recomputes
        again = generation.max_new_tokens
        again = generation.block_length if generation.cache == "dual" else again
        columns += again
        text += f", {again} of them again"
    if generation.guidance:
        columns, text = 2 * columns, f"2 passes x {text}"
    states = micro_batch_states(config, columns)
    return _update_items(config, sizes, states, states * columns, f"{states} states x {text}")


def _by_trajectory(
    config: TrainConfig, sizes: Sizes, size: int, prompt_tokens: int
) -> list[MemoryItem]:
    """Of a micro-batch whose states share the pass of a trajectory, in blocks of ``size``.

    Prompts are counted for every trajectory: those of a micro-batch may all be others. What is
    shared makes room for more trajectories only where a limit on columns has it, and all of them
    attend to it.
    """
    ranks = 1 if config.algorithm.schedule == "per_step" else config.ranks
    columns = prompt_tokens + config.generation.max_new_tokens
    whole = columns + ranks * size
    count, limit = config.prompts_per_step * config.algorithm.group_size, config.micro_batch_tokens
    if limit is not None:
        trajectories = min(count, max(1, limit // whole))
    else:
        assert config.micro_batch_size is not None
        trajectories = min(count, max(1, -(-config.micro_batch_size // ranks)))
    text = f"{trajectories} trajectories x ({columns} columns + {ranks} blocks of {size})"
    items = _update_items(config, sizes, trajectories * ranks, trajectories * whole, text)
    sharing = config.algorithm.sharing(sharded=config.distributed.engine in SHARDED)
    shared = prompt_tokens - prompt_tokens % size
    if limit is None or sharing == "never" or not shared:
        return items
    sharers = min(count, max(1, (limit - shared) // (whole - shared)))
    layers = 1 if config.model.gradient_checkpointing else sizes.layers
    per_column = 2 * sizes.key * sizes.compute * layers
    held = sharers * shared * per_column
    words = f"{sharers} trajectories x {shared} columns x {per_column} B"
    return [*items, MemoryItem("keys and values of shared prompts", held, words, "update")]


def _update_items(
    config: TrainConfig, sizes: Sizes, states: int, tokens: int, text: str
) -> list[MemoryItem]:
    generation = config.generation
    rows = states * generation.max_new_tokens
    workspace = min(DEFAULT_WORKSPACE_BYTES, rows * sizes.vocabulary * _STATISTICS_BYTES)
    items = [
        *_activations(config, sizes, tokens, text),
        MemoryItem(
            "logits workspace",
            workspace,
            f"at most {DEFAULT_WORKSPACE_BYTES >> 20} MiB at once, of any number of rows",
            "update",
        ),
    ]
    # Four-bit weights are restored for each product, and not kept.
    one = config.model.gradient_checkpointing or config.model.activation_offload
    at_once = 0 if config.model.quantization == "nf4" else 1 if one else sizes.layers
    casts = sizes.cast_bytes(at_once)
    if casts:
        items.append(
            MemoryItem("weights in bfloat16", casts, "autocast's copies, 2 B each", "update")
        )
    if not sizes.adapters:
        product = sizes.vocabulary * sizes.width * sizes.weight
        items.append(MemoryItem("head's gradient", product, "vocabulary x width", "update"))
    return items


def _activations(config: TrainConfig, sizes: Sizes, tokens: int, text: str) -> list[MemoryItem]:
    """What autograd keeps of ``tokens``, of which ``text`` says how many they are."""
    n, on = sizes.layers, config.model.gradient_checkpointing
    saved = sizes.saved_per_token() * tokens
    inputs = n * sizes.width * sizes.weight * tokens
    one = f"{sizes.saved_per_token()} B of one layer"
    if config.model.activation_offload:
        casts = 0 if config.model.quantization == "nf4" else sizes.cast_bytes(n)
        moved, what = n * saved + casts, f"{n} x {one}, and weights in bfloat16"
        if on:
            moved, what = inputs // n * (n + 1), f"{n + 1} inputs, of the layers and the final norm"
        return [
            MemoryItem("activations", saved, f"{text} x {one}", "update"),
            MemoryItem("activations in host memory", moved, f"{text} x {what}", "host"),
        ]
    with_it = (inputs + saved, f"{text} x ({n} layer inputs + {one})")
    without = (n * saved, f"{text} x {n} layers x {sizes.saved_per_token()} B")
    used, other = (with_it, without) if on else (without, with_it)
    name = f"activations {'without' if on else 'with'} checkpointing"
    return [
        MemoryItem("activations", *used, "update"),
        MemoryItem(name, *other, "instead"),
    ]


def _rollout(config: TrainConfig, sizes: Sizes, prompt_tokens: int) -> list[MemoryItem]:
    generation = config.generation
    copies = 2 if generation.guidance else 1
    count = config.prompts_per_step * config.algorithm.group_size
    sequences = copies * min(generation.batch_size, count)
    columns = prompt_tokens + generation.max_new_tokens
    per_token, computed = sizes.working_per_token(), columns
    if sizes.blocks is not None:  # a block and the one before it; or the prompts of new groups
        groups = -(-sequences // config.algorithm.group_size)
        computed = max(2 * sizes.blocks, -(-prompt_tokens * groups // sequences))
    items = [
        MemoryItem(
            "rollout activations",
            sequences * computed * per_token,
            f"{sequences} sequences x {computed} columns x {per_token} B",
            "rollout",
        )
    ]
    rows = sequences // copies * generation.block_length
    logits = rows * sizes.vocabulary * sizes.compute
    items.append(
        MemoryItem(
            "rollout logits",
            min(logits, max(LOGITS_BYTES, sizes.vocabulary * sizes.compute)),
            f"{rows} rows x {sizes.vocabulary} x {sizes.compute} B, at most "
            f"{LOGITS_BYTES >> 20} MiB at once",
            "rollout",
        )
    )
    if generation.cache != "none" or sizes.blocks is not None:
        per_column = 2 * sizes.layers * sizes.key * sizes.compute
        items.append(
            MemoryItem(
                "block cache",
                sequences * columns * per_column,
                f"{sequences} sequences x {columns} columns x {per_column} B",
                "rollout",
            )
        )
    if config.algorithm.predicts:
        items.append(
            MemoryItem(
                "hidden states of the value head",
                count * generation.steps * sizes.width * 4,
                f"{count} sequences x {generation.steps} steps x {sizes.width} x 4 B",
                "always",
            )
        )
    return items
