"""How completions are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from egspo.config.options.checks import require

Policy = Literal[
    "low_confidence", "random", "max_prob", "margin", "entropy", "entropy_bounded", "left_to_right"
]


BlockCache = Literal["none", "prefix", "dual"]


@dataclass
class GenerationConfig:
    """How a completion is denoised."""

    max_new_tokens: int = 256
    """Length of a completion."""
    steps: int = 128
    """Denoising steps of a completion, split evenly over its blocks."""
    block_length: int = 32
    """Tokens denoised together; blocks go from left to right."""
    temperature: float = 0.9
    """Of the sampling; 0 decodes greedily, which training cannot use."""
    policy: Policy = "max_prob"
    """Which positions are unmasked first. ``low_confidence`` is the published code's order; its
    step log-probability is a surrogate, the others' is exact."""
    cache: BlockCache = "none"
    """Keys and values made once per block instead of every step: of the ``prefix`` before the
    block, or ``dual``, of everything but the block. Cheaper, and another policy than full
    attention: training and decoding must agree, so this is saved with the weights."""
    guidance: float = 0.0
    """Strength of classifier-free guidance, for a second forward pass per step; 0 for none."""
    threshold: float | None = None
    """Besides a step's quota, reveal every position that scores at least this under ``policy``, or
    with ``entropy_bounded`` the positions of least entropy that add up to less than so many nats.
    The quota, ``block_length`` over the steps of a block, is then the least a step reveals, and
    ``steps`` the most a completion takes."""
    max_tokens_per_step: int | None = None
    """The most positions a step reveals with ``threshold``; None for the whole block."""
    early_exit: bool = True
    """Stop a completion after the block with its first EOS. The text is the same; False denoises
    the rest too, as the published code does."""
    batch_size: int = 32
    """Sequences denoised together, at most."""
    cuda_graphs: bool = False
    """Replay the forward pass of a step as a CUDA graph per batch shape."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "steps", "block_length", "batch_size"):
            value = getattr(self, name)
            require(value > 0, f"generation.{name} must be > 0, got {value}")
        for name in ("temperature", "guidance"):
            value = getattr(self, name)
            require(value >= 0, f"generation.{name} must be >= 0, got {value}")
        require(
            self.max_new_tokens % self.block_length == 0,
            f"generation.max_new_tokens ({self.max_new_tokens}) must be a multiple of "
            f"generation.block_length ({self.block_length})",
        )
        blocks = self.max_new_tokens // self.block_length
        require(
            self.steps % blocks == 0,
            f"generation.steps ({self.steps}) must divide evenly over the {blocks} blocks "
            f"of {self.block_length} tokens",
        )
        require(
            self.steps // blocks <= self.block_length,
            f"generation.steps ({self.steps}) gives {self.steps // blocks} steps to a block of "
            f"{self.block_length} tokens: at most one step per token",
        )
        self._check_threshold()

    def _check_threshold(self) -> None:
        threshold, most = self.threshold, self.max_tokens_per_step
        if threshold is None:
            require(
                self.policy != "entropy_bounded",
                "generation.policy: entropy_bounded needs generation.threshold, the bound in nats",
            )
            require(
                most is None,
                f"generation.max_tokens_per_step ({most}) needs generation.threshold: without it "
                "every step reveals its quota",
            )
            return
        if self.policy == "entropy_bounded":
            require(threshold > 0, f"generation.threshold must be > 0 nats, got {threshold}")
            self._check_most()
            return
        policies = ("max_prob", "margin", "low_confidence")
        require(
            self.policy in policies,
            f"generation.threshold is compared with a score in [0, 1], which policy "
            f"{self.policy!r} does not have; choose from {policies}",
        )
        require(0 < threshold <= 1, f"generation.threshold must be in (0, 1], got {threshold}")
        self._check_most()

    def _check_most(self) -> None:
        least, most = -(-self.max_new_tokens // self.steps), self.max_tokens_per_step
        require(
            most is None or least <= most <= self.block_length,
            f"generation.max_tokens_per_step must be between {least}, the quota of a step, and "
            f"generation.block_length ({self.block_length}), got {most}",
        )
