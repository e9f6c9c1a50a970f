"""What block caches cost and change: FLOPs, time, and logits against full attention.

    python -m benchmarks.cached_decoding --model runs/sudoku_tiny/final --block-length 8 --steps 16

Decodes prompts of the small Sudoku task with each cache. The canvases along the trajectory of each
are put before full attention too, and the log-probabilities, at temperature 1, of the masked
positions of the active block are compared.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware import provenance
from egspo.cli.common import hide_loading_bars
from egspo.config import BlockCache, GenerationConfig
from egspo.models import load_model, load_tokenizer
from egspo.models.tokenization import encode_prompts
from egspo.rollouts.decoder import Decoder
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout
from egspo.rollouts.trajectory import PromptBatch, Trajectory
from egspo.rollouts.work import ModelCost
from egspo.serving.named_model import weights_folder
from egspo.tasks import build_task

CACHES: tuple[BlockCache, ...] = ("none", "prefix", "dual")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model trained on Sudoku, or its run")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--block-length", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=3, help="of the timing; the least counts")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    denoiser, prompts = _load(args.model, args.prompts)
    config = GenerationConfig(
        max_new_tokens=16,
        steps=args.steps,
        block_length=args.block_length,
        temperature=args.temperature,
        batch_size=args.prompts,
    )
    rows = [
        measure(denoiser, prompts, replace(config, cache=cache), args.repeats) for cache in CACHES
    ]
    _print(rows)
    if args.output is not None:
        command = shlex.join(["python", "-m", "benchmarks.cached_decoding", *sys.argv[1:]])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        record = {**provenance(command), "rows": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(
    denoiser: Denoiser, prompts: PromptBatch, config: GenerationConfig, repeats: int
) -> dict[str, Any]:
    """FLOPs and seconds per sequence, and the difference from full attention."""
    ids = torch.arange(len(prompts), device=prompts.ids.device)
    seconds = []
    for _ in range(repeats):
        before, start = denoiser.work.copy(), time.perf_counter()
        trajectory = rollout(denoiser, prompts, config, seed=0, sequence_ids=ids)
        seconds.append(time.perf_counter() - start)
        work = denoiser.work - before
    cost = ModelCost.of(denoiser.model)
    assert cost is not None
    return {
        "cache": config.cache,
        "flops_per_sequence": cost.forward(work) / len(prompts),
        "seconds": min(seconds),
        **differences(denoiser, trajectory, config),
    }


@torch.no_grad()
def differences(
    denoiser: Denoiser, trajectory: Trajectory, config: GenerationConfig
) -> dict[str, float]:
    """Between the cached decoder and full attention on the states of ``trajectory``."""
    decoder = Decoder(denoiser, config.block_length, config.cache)
    full = Decoder(denoiser, config.block_length)
    absolute, divergence, agree = [], [], []
    for step in range(trajectory.num_steps):
        rows = (trajectory.steps > step).nonzero()[:, 0]
        when = trajectory.unmask_step[rows]
        start = (when == step).int().argmax(1) // config.block_length * config.block_length
        canvas = trajectory.canvas(rows, torch.full_like(rows, step))
        positions = start[:, None] + torch.arange(config.block_length, device=rows.device)
        masked = when.gather(1, positions) >= step
        sequence = masked.nonzero()[:, 0]
        log_probs = [
            _log_probs(each, trajectory, rows, canvas, start, sequence, positions[masked])
            for each in (decoder, full)
        ]
        cached, exact = log_probs
        kept = exact > -20  # what has no probability may differ by anything
        absolute.append((cached - exact).abs()[kept])
        divergence.append((exact.exp() * (exact - cached)).nan_to_num().sum(1))
        agree.append((cached.argmax(1) == exact.argmax(1)).double())
    return {
        "log_prob_difference_mean": float(torch.cat(absolute).mean()),
        "log_prob_difference_max": float(torch.cat(absolute).max()),
        "kl_mean": float(torch.cat(divergence).mean()),
        "argmax_agreement": float(torch.cat(agree).mean()),
    }


def _log_probs(
    decoder: Decoder,
    trajectory: Trajectory,
    rows: Tensor,
    canvas: Tensor,
    start: Tensor,
    sequence: Tensor,
    position: Tensor,
) -> Tensor:
    prompts = PromptBatch(trajectory.prompts.ids[rows], trajectory.prompts.mask[rows])
    context = decoder.begin_block(
        prompts,
        trajectory.block_canvas(rows, start),
        start,
        earliest=int(start.min()),
        padded=not bool(prompts.mask.all()),
    )
    logits = decoder.denoiser.logits(decoder.window(context, canvas).rows(sequence, position))
    logits[:, decoder.denoiser.mask_id] = float("-inf")
    return logits.double().log_softmax(1)


def _load(path: str, count: int) -> tuple[Denoiser, PromptBatch]:
    folder = weights_folder(path, "model")
    hide_loading_bars()
    model: Any = load_model(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder, model.config)
    denoiser = Denoiser.of(model, tokenizer)
    task = build_task(
        "sudoku", prompt_style="digits", test_examples=count, test_grids=48, empty_cells=[6, 10]
    )
    encoded = encode_prompts(tokenizer, [example.prompt for example in task.test])
    return denoiser, PromptBatch.from_lists(encoded, denoiser.pad_id, denoiser.device)


def _print(rows: list[dict[str, Any]]) -> None:
    base = rows[0]
    print(
        "| cache | GFLOP per sequence | | seconds | mean abs. difference | largest | KL | argmax |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['cache']} | {row['flops_per_sequence'] / 1e9:.3f} "
            f"| {base['flops_per_sequence'] / row['flops_per_sequence']:.2f}x fewer "
            f"| {row['seconds']:.2f} | {row['log_prob_difference_mean']:.4f} "
            f"| {row['log_prob_difference_max']:.2f} | {row['kl_mean']:.5f} "
            f"| {100 * row['argmax_agreement']:.2f} % |"
        )


if __name__ == "__main__":
    main()
