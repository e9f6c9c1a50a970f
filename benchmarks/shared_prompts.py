"""What sharing a prompt saves of the time of a block-causal model's update.

    OMP_NUM_THREADS=1 python -m benchmarks.shared_prompts

Processor-seconds of a loss and its gradients, the fastest of six in turn. The states are drawn from
made-up trajectories: what is in them does not matter to the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks.markdown import table
from egspo.algorithm.replay import Scorer, Scores
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, GenerationConfig, SharePrompts
from egspo.models import new_model
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import PromptBatch, Trajectory

GENERATION = GenerationConfig(max_new_tokens=128, steps=64, block_length=8)
CASES = [
    *((16, 2, 4), (48, 2, 4), (48, 4, 4), (48, 4, 1)),
    *((200, 2, 4), (200, 4, 4), (200, 8, 8), (200, 8, 1)),
]
"""Tokens of the prompt, trajectories, states of each."""
WIDTHS = (128, 512)


def denoiser_of(width: int) -> Denoiser:
    """A new SDAR of two layers."""
    fields = {
        "model_type": "sdar",
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "head_dim": 64,
        "intermediate_size": 3 * width,
        "vocab_size": 1000,
        "block_size": GENERATION.block_length,
        **{"mask_token_id": 5, "eos_token_id": 1, "pad_token_id": 1},
    }
    return Denoiser(new_model(fields, seed=0), mask_id=5, eos_id=1, pad_id=1)


def states_of(prompt: int, trajectories: int, count: int) -> States:
    """So many of each trajectory behind the same prompt."""
    length, steps = GENERATION.max_new_tokens, GENERATION.steps
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 1000, (prompt,), generator=generator).expand(trajectories, -1)
    tokens = torch.randint(6, 1000, (trajectories, length), generator=generator)
    step = (torch.arange(length) // (length // steps)).to(torch.int16).expand(trajectories, -1)
    nothing, of_steps = torch.zeros(trajectories, length), torch.zeros(trajectories, steps)
    trajectory = Trajectory(
        *(PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool)), tokens, step),
        *(nothing, nothing, of_steps, of_steps),
        *(torch.full((trajectories,), n) for n in (steps, length)),
        mask_id=5,
    )
    drawn = [torch.randperm(steps, generator=generator)[:count] for _ in range(trajectories)]
    return States.from_selection(trajectory, torch.stack(drawn))


def measured(denoiser: Denoiser, states: States, share: SharePrompts) -> tuple[float, int]:
    """Seconds and columns."""
    scorer = Scorer(denoiser, AlgorithmConfig(beta=0.0, share_prompts=share), GENERATION)
    one = torch.ones(len(states), dtype=torch.float64)
    scores = Scores(None, one, None, None, None, [])
    denoiser.model.zero_grad()
    begun, before = time.process_time(), denoiser.work.copy()
    loss = scorer.surrogate(states, torch.arange(len(states)), scores, one, 1.0).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return time.process_time() - begun, (denoiser.work - before).tokens


def lines() -> Iterator[list[str]]:
    """A case each: what it is, and how many times fewer columns and seconds shared passes take."""
    denoisers = [denoiser_of(width) for width in WIDTHS]
    for case in CASES:
        states, ratios = states_of(*case), []
        for denoiser in denoisers:
            runs = [
                [measured(denoiser, states, share) for share in ("never", "always")]
                for _ in range(6)
            ]
            (apart, columns), (together, fewer) = (min(each) for each in zip(*runs, strict=True))
            ratios.append(apart / together)
        numbers = [f"{ratio:.2f}" for ratio in (columns / fewer, *ratios)]
        yield [", ".join(map(str, case)), *numbers]


def main() -> None:
    seconds = (f"seconds, width {width}" for width in WIDTHS)
    print(table(["prompt, trajectories, states of each", "columns", *seconds], lines()))


if __name__ == "__main__":
    main()
