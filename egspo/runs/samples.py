"""Trajectories to look at: what a run keeps of its rollouts, and what ``egspo inspect`` reads.

A file has a JSON object per line and trajectory. ``egspo generate --step-map`` writes the same
without what only training knows.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from egspo.config import GenerationConfig
from egspo.config.convert import from_mapping
from egspo.files import remove_partial, replacing, set_aside
from egspo.rollouts.completion import FinishReason, TokenStep

logger = logging.getLogger("egspo")

SAMPLES = "samples"
"""Folder of a run that holds them."""


@dataclass(frozen=True)
class SelectedStep:
    """A denoising step that was trained."""

    rank: int
    """Place in the selection, from 0: by entropy, where that selects."""
    step: int
    advantage: float | None
    completion: str | None = None
    """Greedy one-step completion of the state before the step (EGSPO-SA)."""
    reward: float | None = None
    """Of that completion; or what the value head predicts."""


@dataclass(frozen=True)
class TrajectoryRecord:
    """One trajectory with everything there is to show."""

    index: int
    """Of the prompt, or in the group of a training step."""
    completion: str
    finish_reason: FinishReason
    tokens: int
    """Before the first EOS."""
    generation: GenerationConfig
    step_map: list[TokenStep]
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    """The prompt as a chat."""
    prompt_index: int | None = None
    """In the training set."""
    reward: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    """By reward function, unweighted; without those that do not apply."""
    step_reward: float | None = None
    """What the rewards of one-step completions are compared with (EGSPO-SA)."""
    step_entropy: list[float | None] | None = None
    """In nats, as it was selected by; otherwise see :attr:`entropy`."""
    selected: list[SelectedStep] = field(default_factory=list)

    @property
    def chat(self) -> list[dict[str, str]]:
        if self.messages is not None:
            return self.messages
        return [] if self.prompt is None else [{"role": "user", "content": self.prompt}]

    @property
    def steps(self) -> int:
        """Taken."""
        return 1 + max((token.step for token in self.step_map), default=-1)

    @property
    def entropy(self) -> list[float]:
        """By step taken, in nats: the recorded step entropy, or the mean of the tokens revealed."""
        if self.step_entropy is not None:
            return [math.nan if value is None else value for value in self.step_entropy]
        by_step: list[list[float]] = [[] for _ in range(self.steps)]
        for token in self.step_map:
            by_step[token.step].append(token.entropy)
        return [statistics.fmean(values) if values else math.nan for values in by_step]

    @property
    def eos_id(self) -> int | None:
        """Token that ended the completion."""
        ends = (token.token_id for token in self.step_map if token.position == self.tokens)
        return next(ends, None)


def write_group(run: Path, step: int, group: Sequence[TrajectoryRecord]) -> Path:
    """Write ``run/samples/step-<step>.jsonl``: complete, or not at all."""
    folder = run / SAMPLES
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    file = folder / f"step-{step:06d}.jsonl"
    with replacing(file) as partial, partial.open("w", encoding="utf-8") as stream:
        for record in group:
            values = {k: v for k, v in asdict(record).items() if v is not None}
            stream.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
    return file


def list_samples(run: Path) -> dict[int, Path]:
    """Files of a run by training step, oldest first; files with other names are left alone."""
    steps = {}
    for file in (run / SAMPLES).glob("step-*.jsonl"):
        digits = file.stem.removeprefix("step-")
        if file.is_file() and digits.isascii() and digits.isdecimal():
            steps[int(digits)] = file
    return dict(sorted(steps.items()))


def set_damaged_aside(run: Path, completed: int) -> None:
    """Rename the samples of steps up to ``completed`` that cannot be read, with a warning: a run
    goes on without them."""
    for step, file in list_samples(run).items():
        if step > completed:
            continue
        try:
            read_trajectories(file)
        except (ValueError, OSError) as error:
            logger.warning("%s; it is kept in %s, the run goes on", error, set_aside(file))


def carry_samples(source: Path, run: Path, completed: int) -> None:
    """Copy to ``run`` what ``source``, which it continues elsewhere, kept up to ``completed``."""
    if source.resolve() == run.resolve():
        return
    for step, file in list_samples(source).items():
        if step <= completed:
            (run / SAMPLES).mkdir(parents=True, exist_ok=True)
            with replacing(run / SAMPLES / file.name) as temporary:
                shutil.copy(file, temporary)


def read_trajectories(file: Path) -> list[TrajectoryRecord]:
    """The trajectories of a file; keys that are not theirs are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a trajectory, which says why.
    """
    records = []
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            records.append(_parse(line, f"{file}, line {number}"))
    if not records:
        raise ValueError(f"{file} has no trajectories")
    return records


def _parse(line: str, where: str) -> TrajectoryRecord:
    try:
        record: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(record, dict) or "step_map" not in record:
        raise ValueError(
            f"{where} has no step_map: it is not of a run's {SAMPLES} folder, or of "
            "egspo generate --step-map with JSONL output"
        )
    names = {f.name for f in fields(TrajectoryRecord)}
    known = {name: value for name, value in record.items() if name in names}
    result: TrajectoryRecord = from_mapping(TrajectoryRecord, known, where)
    steps = len(result.entropy)
    for selected in result.selected:
        if not 0 <= selected.step < steps:
            raise ValueError(f"{where} selects step {selected.step} of {steps}")
    return result


def finite_or_none(value: Tensor | float) -> float | None:
    """``value``, or None where it is NaN or infinite: what JSON can say."""
    number = float(value)
    return number if math.isfinite(number) else None
