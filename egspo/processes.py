"""The processes that a launcher started, for work that is divided among them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """One process, or those that ``accelerate launch`` or ``torchrun`` started.

    Raises:
        ValueError: accelerate sees another number of processes than were started.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    # Started by torchrun on CPUs, it would otherwise see one process.
    on_cpus = started > 1 and not torch.cuda.is_available()
    # Who is done first waits for the others, hours maybe: that is no hang.
    state = PartialState(cpu=on_cpus, timeout=timedelta(days=2))
    if state.num_processes != started:
        raise ValueError(
            f"the launcher started {started} processes (WORLD_SIZE), accelerate sees "
            f"{state.num_processes}: they would all do the same"
        )
    return state
