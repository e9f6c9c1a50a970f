"""Columns and FLOPs of an iteration, counted: block-causal models beside full attention.

    python -m benchmarks.block_models

Nothing is run and no weights are needed: the passes are those that a run makes
(``egspo/planning/expected_work.py``, which tests compare with what runs log), and the cost of a
column is that of the parameters that a token goes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from egspo.config import AlgorithmConfig, GenerationConfig, ModelConfig, SharePrompts, TrainConfig
from egspo.models import model_on_meta
from egspo.models.published import published_config
from egspo.planning.expected_work import expected_work
from egspo.rollouts.work import ModelCost

PROMPT = 200
PHASES = ("rollout", "score", "update")
RUN = TrainConfig(
    model=ModelConfig(path="published"),
    generation=GenerationConfig(batch_size=64),
    algorithm=AlgorithmConfig(),
    prompts_per_step=1,
    micro_batch_size=64,  # a whole group, which shares its prompt
)


@dataclass(frozen=True)
class Row:
    """An iteration of one way to decode."""

    name: str
    columns: dict[str, int]
    flops: dict[str, float]


def count(
    name: str,
    hub: str,
    generation: GenerationConfig,
    share_prompts: SharePrompts = "auto",
    *,
    stepwise: bool,
) -> Row:
    """An iteration of a group of eight completions, all of whose steps are taken."""
    config = published_config(hub)
    assert config is not None
    model = model_on_meta(config)
    model.requires_grad_(False)  # the base under an adapter, whose own products are left out
    cost = ModelCost.of(model)
    assert cost is not None
    algorithm = replace(RUN.algorithm, stepwise=stepwise, beta=0.0, share_prompts=share_prompts)
    run = replace(RUN, generation=generation, algorithm=algorithm)
    if share_prompts == "never":
        run = replace(run, micro_batch_size=RUN.algorithm.selected_steps)
    blocks = getattr(config, "block_size", None)
    work = expected_work(run, [PROMPT], config.prediction_shift, cost, blocks)
    flops = {
        phase: float((cost.training if phase == "update" else cost.forward)(work[phase]))
        for phase in PHASES
    }
    return Row(name, {phase: work[phase].tokens for phase in PHASES}, flops)


def rows(*, stepwise: bool) -> list[Row]:
    """LLaDA-8B by full attention and dual cache, and the block-causal models."""
    full = RUN.generation
    small = replace(full, block_length=4)
    chosen: list[tuple[str, str, GenerationConfig, SharePrompts]] = [
        ("LLaDA-8B, full attention", "GSAI-ML/LLaDA-8B-Instruct", full, "auto"),
        ("LLaDA-8B, dual cache", "GSAI-ML/LLaDA-8B-Instruct", replace(full, cache="dual"), "auto"),
        ("SDAR-8B, blocks of 4", "JetLM/SDAR-8B-Chat", small, "auto"),
        ("SDAR-30B-A3B, blocks of 4", "JetLM/SDAR-30B-A3B-Chat", small, "auto"),
        ("LLaDA2.0-mini, blocks of 32", "inclusionAI/LLaDA2.0-mini", full, "auto"),
        ("SDAR-8B, a pass per completion", "JetLM/SDAR-8B-Chat", small, "never"),
        ("LLaDA2.0-mini, a pass per completion", "inclusionAI/LLaDA2.0-mini", full, "never"),
    ]
    return [count(*one, stepwise=stepwise) for one in chosen]


def table(found: Sequence[Row]) -> str:
    """Markdown: columns, and TFLOP, by phase."""
    head = " | ".join([*(f"{p}, columns" for p in PHASES), *(f"{p}, TFLOP" for p in PHASES)])
    lines = [f"| | {head} |", "|---|" + "---|" * (2 * len(PHASES))]
    for row in found:
        columns = [f"{row.columns[phase]:,}" for phase in PHASES]
        flops = [f"{row.flops[phase] / 1e12:,.0f}" for phase in PHASES]
        lines.append(f"| {row.name} | {' | '.join([*columns, *flops])} |")
    return "\n".join(lines)


def main() -> None:
    for stepwise, name in ((False, "EGSPO"), (True, "EGSPO-SA")):
        print(f"{name}\n\n{table(rows(stepwise=stepwise))}\n")


if __name__ == "__main__":
    main()
