"""``egspo eval``."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egspo.cli.common import AddCommand, configure_output
from egspo.cli.model import add_adapter_argument, add_generation_arguments, given_generation
from egspo.files import set_aside
from egspo.runs.lock import RunLock
from egspo.runs.published import NotOursError

if TYPE_CHECKING:
    from egspo.config import GenerationConfig, TaskConfig, TrainConfig
    from egspo.serving.named_model import NamedModel

_EPILOG = """\
examples:
  egspo eval runs/sudoku_tiny
  egspo eval runs/sudoku_tiny --checkpoint best
  egspo eval GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k,math500 --lengths 128,256,512
  egspo eval GSAI-ML/LLaDA-8B-Instruct --adapter runs/llada_8b_sudoku --checkpoint best
  egspo eval MODEL --tasks mine --task-file tasks/mine.py --task-option mine.words=50
  accelerate launch -m egspo.cli eval MODEL --tasks gsm8k        several GPUs

Of a run, the task is the run's own, with its options, unless --tasks says otherwise; where
--tasks names it, options left out are the run's. Lengths left out are the one trained with,
and steps grow with the length: as many tokens per step as in training. Decoding is greedy
unless --temperature is given.

Samples are on disk one by one: the same command goes on after an interrupt. More tasks,
lengths, prompts or samples may be added later; anything else needs another folder. The
checkpoint `best` is the one with the best held-out reward in training.
"""


def add_commands(add: AddCommand) -> None:
    command = add("eval", "measure a model on tasks, at several lengths", _evaluate, _EPILOG)
    _add_arguments(command)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run, checkpoint, folder of weights or hub name")
    add_adapter_argument(parser)
    text = "of the run (the adapter's, where there is one): best, last or a step"
    add("--checkpoint", metavar="WHICH", help=f"{text} (default: the final model)")
    add("--tasks", type=_names, metavar="A,B,...", help="by name")
    add("--task-file", metavar="FILE", help="Python file that registers tasks")
    text = "option of a task's builder, the value in YAML; repeatable"
    add("--task-option", action="append", default=[], metavar="TASK.KEY=VALUE", help=text)
    add("--split", choices=("test", "validation"), default="test", help="(default test)")
    add("--lengths", type=_lengths, metavar="N,N,...", help="of completions, in tokens")
    add("--limit", type=int, metavar="N", help="the first N prompts of each task only")
    text = "completions per prompt, which score as their mean (pass@1); needs --temperature"
    add("--samples", type=int, default=1, metavar="N", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of the sampling noise (default 0)")
    text = "(default: eval/CHECKPOINT inside the run, or runs/eval/MODEL)"
    add("--output-dir", type=_folder, metavar="DIR", help=text)
    text = "start over; the old folder is kept as DIR.old-TIMESTAMP"
    add("--overwrite", action="store_true", help=text)
    text = "that a process waits for the others (default 30 min to begin, then 2 days)"
    add("--timeout", type=_seconds, metavar="SECONDS", help=text)
    add_generation_arguments(parser, without=["max_new_tokens"])


def _evaluate(args: argparse.Namespace) -> None:
    configure_output()
    from egspo.engines.processes import Processes, process_state
    from egspo.evaluations.metrics import metric_notes
    from egspo.evaluations.plan import SAMPLES, EvaluationPlan, fingerprint, load_task
    from egspo.evaluations.run import run_evaluation
    from egspo.training.occupation import writing_alone

    run = _run_of(args.adapter or args.model)
    chosen, checkpoint = _chosen_model(args, run)
    trained = None if run is None else _config_of(run)
    plan = EvaluationPlan(
        tasks=_tasks(args, trained),
        generations=_generations(args, chosen.trained),
        output=args.output_dir or _default_output(args, run, checkpoint),
        split=args.split,
        limit=args.limit,
        samples=args.samples,
        seed=args.seed,
    )
    tasks = {config.name: load_task(config) for config in plan.tasks}
    notes = _notes(args, trained, tasks, checkpoint)
    wait = args.timeout
    state = process_state() if wait is None else process_state(timedelta(seconds=wait))
    if args.overwrite:
        _set_aside(plan.output, state)
    processes = Processes() if wait is None else Processes(wait)
    leftovers = [plan.output, plan.output / SAMPLES]
    alone = writing_alone(plan.output, processes, leftovers=leftovers, name="--output-dir")
    with alone as check, processes.collective():
        with state.main_process_first():  # which downloads
            model, tokenizer = chosen.load(state.device)
        name = chosen.path if chosen.adapter is None else f"{chosen.path} with {chosen.adapter}"
        rows = run_evaluation(
            plan,
            tasks,
            model,
            tokenizer,
            name=name,
            weights={"model": fingerprint(chosen.path), "adapter": fingerprint(chosen.adapter)},
            state=state,
            notes=notes,
            check=check,
        )
    if state.is_main_process:
        _show(rows, name, [*metric_notes(list(tasks.values())), *notes], plan.output)


def _run_of(where: str) -> Path | None:
    """The run that the model or adapter at ``where`` is of, or is in."""
    path = Path(where)
    if not path.exists():
        return None
    for folder in (path, *path.absolute().parents[:3]):
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            return folder
    return None


def _config_of(run: Path) -> TrainConfig:
    """The run's configuration, with its own copy of the task file."""
    from egspo.config.recipe import TASK_COPY, load_config

    config = load_config(run / "config.yaml")
    if (run / TASK_COPY).is_file():
        config.task = replace(config.task, file=str(run / TASK_COPY))
    return config


def _chosen_model(args: argparse.Namespace, run: Path | None) -> tuple[NamedModel, Path | None]:
    """What to load, and the checkpoint that was asked for."""
    from egspo.serving.named_model import NamedModel, weights_folder

    model, adapter, checkpoint = args.model, args.adapter, None
    if args.checkpoint is not None:
        from egspo.evaluations.checkpoints import choose_checkpoint

        if run is None:
            raise ValueError(
                f"--checkpoint chooses from a run, and {adapter or model} is none: it has no "
                "config.yaml with metrics.jsonl"
            )
        checkpoint = choose_checkpoint(run, args.checkpoint)
        model, adapter = (str(checkpoint), None) if adapter is None else (model, str(checkpoint))
    if adapter is not None:
        adapter = weights_folder(adapter, "adapter", option="egspo eval ")
    return NamedModel(weights_folder(model, "model", option="egspo eval "), adapter), checkpoint


def _tasks(args: argparse.Namespace, trained: TrainConfig | None) -> list[TaskConfig]:
    """The tasks with their options; of the run's own task, those left out are the run's."""
    from egspo.config import TaskConfig
    from egspo.tasks import load_task_file

    own = None if trained is None else trained.task
    names = args.tasks
    if names is None:
        if own is None:
            raise ValueError("no tasks: give --tasks A,B,... (only a run has a task of its own)")
        names = [own.name]
    options = _task_options(args.task_option, names)
    from_file = [] if args.task_file is None else load_task_file(args.task_file)
    tasks = []
    for name in names:
        config = own if own is not None and name == own.name else TaskConfig(name)
        file = args.task_file if name in from_file else config.file
        tasks.append(replace(config, file=file, options={**config.options, **options[name]}))
    return tasks


def _task_options(given: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """``TASK.KEY=VALUE`` by task."""
    from egspo.config.recipe import read_overrides

    options = {name: {} for name in names} | read_overrides(given)
    for name, values in options.items():
        if name not in names:
            raise ValueError(f"--task-option {name}: it is none of the tasks {names}")
        if not isinstance(values, dict):
            raise ValueError(f"--task-option {name}={values}: expected TASK.KEY=VALUE")
    return options


def _generations(args: argparse.Namespace, folder: str) -> list[GenerationConfig]:
    """One configuration per length, greedy and with the trained tokens per step unless given."""
    from egspo.serving.named_model import generation_config

    trained = generation_config({}, folder)
    generations = []
    for length in args.lengths or [trained.max_new_tokens]:
        given = {"temperature": 0.0, **given_generation(args), "max_new_tokens": length}
        if "steps" not in given:
            steps, rest = divmod(length * trained.steps, trained.max_new_tokens)
            if rest:
                raise ValueError(
                    f"--lengths {length}: at {trained.max_new_tokens / trained.steps:g} tokens per "
                    "step, as in training, the steps are no whole number: give --steps"
                )
            given["steps"] = steps
        generations.append(generation_config(given, folder))
    return generations


def _default_output(args: argparse.Namespace, run: Path | None, checkpoint: Path | None) -> Path:
    if run is not None:
        return run / "eval" / ("final" if checkpoint is None else checkpoint.name)
    names = [args.model] if args.adapter is None else [args.model, args.adapter]
    return Path("runs", "eval", "--".join(name.strip("/.").replace("/", "--") for name in names))


def _notes(
    args: argparse.Namespace,
    trained: TrainConfig | None,
    tasks: dict[str, Any],
    checkpoint: Path | None,
) -> list[str]:
    """What a reader of the scores must know."""
    if trained is None or checkpoint is None or args.checkpoint != "best":
        return []
    own = tasks.get(trained.task.name)
    if own is None or own.validation or args.split != "test":
        return []
    return [
        f"The checkpoint {checkpoint.name} was chosen on these prompts: task {own.name} has no "
        "validation split, so training evaluates on the test split, and the score is too high."
    ]


def _set_aside(output: Path, state: Any) -> None:
    """Rename the folder of an earlier evaluation; raises NotOursError where it is none."""
    from egspo.evaluations.plan import PLAN_FILE, SAMPLES

    if state.is_main_process and os.path.lexists(output):
        known = (PLAN_FILE, SAMPLES)
        ours = output.is_dir() and any((output / name).exists() for name in known)
        if not ours and not (output.is_dir() and not any(output.iterdir())):
            raise NotOursError(
                f"--output-dir {output} is no evaluation: --overwrite renames nothing else"
            )
        RunLock(output, name="--output-dir").release()  # nobody else is writing there
        print(f"egspo: the earlier evaluation is kept in {set_aside(output)}", file=sys.stderr)
    state.wait_for_everyone()


def _show(rows: Any, name: str, notes: list[str], output: Path) -> None:
    from egspo.evaluations.summary import MARKDOWN, footnotes, to_table
    from egspo.inspection.console import PlainConsole

    console = PlainConsole(highlight=False)
    console.print(to_table(rows, name))
    for line in (*footnotes(rows), *notes):
        console.print(line, markup=False)
    print(f"samples: {output / 'samples'}\ntable: {output / MARKDOWN}")


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("it must not be empty; the working directory is .")
    return Path(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e8:  # also no NaN; three years
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(length) for length in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers such as 128,256, got {text!r}")
    return lengths
