"""What ``egspo plan`` prints: tables for people, or one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Column, Table

from egspo.planning.dry_run import memory_table
from egspo.planning.plan import PHASES, Plan, PlanError, Planner, Suggestion

NOT_COVERED = (
    "Not covered: the CUDA context, cuBLAS workspaces, CUDA graphs and fragments of the allocator, "
    "which come on top of the peak; evaluation batches larger than the rollout's; a second process "
    "on the GPU. A time has no rewards, evaluation or checkpoints in it."
)


@dataclass(frozen=True)
class Report:
    """A plan against the memory of a GPU."""

    planner: Planner
    available: int
    """Bytes of one GPU."""
    rates: Mapping[str, float] | None
    """FLOP/s of one GPU by phase."""
    suggestions: Sequence[Suggestion]
    """Empty where the recipe fits."""

    @property
    def fits(self) -> bool:
        return self.planner.plan.peak <= self.available

    def seconds(self, plan: Plan) -> dict[str, float] | None:
        """Of a step, by phase; None without rates."""
        if self.rates is None:
            return None
        gpus = self.planner.gpus
        needed = [phase for phase in PHASES if plan.flops[phase]]
        if missing := [phase for phase in needed if phase not in self.rates]:
            raise PlanError(f"no rate of the phase {missing[0]!r}, which was not measured")
        return {p: plan.flops[p] / gpus / self.rates[p] if p in needed else 0.0 for p in PHASES}

    def hours(self, plan: Plan) -> float | None:
        """Of the whole run, on all GPUs at once."""
        seconds = self.seconds(plan)
        return None if seconds is None else self.planner.config.steps * sum(seconds.values()) / 3600


def make_report(planner: Planner, available: int, rates: Mapping[str, float] | None) -> Report:
    """Of the planner's recipe, with suggestions where it does not fit ``available`` bytes."""
    fits = planner.plan.peak <= available
    return Report(planner, available, rates, () if fits else planner.suggestions(available))


def as_json(report: Report) -> dict[str, Any]:
    """Everything that :func:`print_plan` shows, bytes and seconds in full."""
    planner, plan = report.planner, report.planner.plan
    hours = report.hours(plan)
    return {
        "fits": report.fits,
        "gpu_memory": report.available,
        "gpus": planner.gpus,
        "peak": plan.peak,
        "memory": [asdict(item) for item in plan.memory],
        "flops": plan.flops,
        "seconds": report.seconds(plan),
        "steps": planner.config.steps,
        "hours": hours,
        "gpu_hours": None if hours is None else hours * planner.gpus,
        "prompt_tokens": planner.looked.prompt_tokens,
        "prompts_known": planner.looked.prompts_known,
        "notes": planner.looked.notes,
        "shares": asdict(planner.shares),
        "suggestions": [
            {
                "overrides": each.overrides,
                "effect": each.effect,
                "peak": each.plan.peak,
                "fits": each.plan.peak <= report.available,
                "flops": each.plan.flops,
                "seconds": report.seconds(each.plan),
            }
            for each in report.suggestions
        ],
        "not_covered": NOT_COVERED,
    }


def print_plan(report: Report, console: Console) -> None:
    """The same as tables."""
    planner, plan = report.planner, report.planner.plan
    console.print(_phases(report))
    console.print(memory_table(plan.memory, planner.looked))
    for note in planner.looked.notes:
        console.print(escape(note))
    room = report.available - plan.peak
    verdict = "[green]fits[/]" if report.fits else "[red]does not fit[/]"
    sizes = f"{plan.peak / 1e9:.2f} GB of {report.available / 1e9:.2f} GB"
    console.print(
        f"The recipe {verdict}: {sizes} on each of {planner.gpus} GPU(s), "
        f"{abs(room) / 1e9:.2f} GB {'left' if room >= 0 else 'short'}."
    )
    if report.suggestions:
        console.print(_suggested(report))
    if not report.fits and all(s.plan.peak > report.available for s in report.suggestions):
        console.print("No change that is known here makes it fit this GPU.")
    console.print(NOT_COVERED)


def _phases(report: Report) -> Group:
    planner, plan = report.planner, report.planner.plan
    shares, seconds = planner.shares, report.seconds(plan)
    title = (
        f"A training step, {shares.saved_steps:.0%} of the denoising steps saved by early exit, "
        f"{shares.scored_states:.0%} of the states scored, {shares.trained_states:.0%} trained"
    )
    table = Table("phase")
    table.add_column("TFLOP", justify="right", no_wrap=True)
    table.add_column("share", justify="right")
    if seconds is not None:
        table.add_column("seconds", justify="right", no_wrap=True)
    total = sum(plan.flops.values()) or 1
    for phase in PHASES:
        row = [phase, f"{plan.flops[phase] / 1e12:,.4g}", f"{plan.flops[phase] / total:.0%}"]
        table.add_row(*row, *([f"{seconds[phase]:,.4g}"] if seconds else []))
    table.add_section()
    row = ["sum", f"{total / 1e12:,.4g}", ""]
    table.add_row(*row, *([f"{sum(seconds.values()):,.4g}"] if seconds else []), style="bold")
    steps, hours = planner.config.steps, report.hours(plan)
    if hours is None:
        table.caption = f"{steps} steps: {steps * total / 1e18:,.3g} EFLOP; --rates gives GPU-hours"
    else:
        table.caption = (
            f"{steps} steps: {hours:,.3g} hours, {hours * planner.gpus:,.3g} GPU-hours on "
            f"{planner.gpus} GPU(s)"
        )
    return Group(title, table)


def _suggested(report: Report) -> Table:
    change = Column("change", overflow="fold")
    table = Table(change, title="What would change that", title_justify="left")
    table.add_column("peak GB", justify="right", no_wrap=True)
    table.add_column("TFLOP a step", justify="right", no_wrap=True)
    table.add_column("fits")
    table.add_column("effect")
    for each in report.suggestions:
        fits = each.plan.peak <= report.available
        table.add_row(
            escape(" ".join(each.overrides)),
            f"{each.plan.peak / 1e9:.2f}",
            f"{sum(each.plan.flops.values()) / 1e12:,.4g}",
            "[green]yes[/]" if fits else "[red]no[/]",
            each.effect,
        )
    return table
