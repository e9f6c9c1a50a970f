"""The hub, asked once whether it is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled


@contextmanager
def asked_once(names: Iterable[str | None]) -> Iterator[str | None]:
    """Inside, only the hub's cache is looked at where the hub itself cannot be reached.

    Every file that is asked for in vain costs several attempts, each with its own time-out.

    Args:
        names: folders, or names on the hub; it is asked only where there is one of these.

    Yields:
        Why it cannot be reached; None where it can, or nobody needs it.
    """
    why = None
    if any(name is not None and not Path(name).exists() for name in names):
        why = _unreachable()
    if why is None:
        yield None
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def is_unreachable(error: BaseException) -> bool:
    """Whether ``error`` only says that the hub cannot be reached, not that something is wrong.

    An unreachable sandbox is wrong: it raises a ``RuntimeError``.
    """
    cause: BaseException | None = None if isinstance(error, RuntimeError) else error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _unreachable() -> str | None:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of the HTTP library, which is huggingface_hub's choice
        return f"{constants.ENDPOINT}: {error}"
    return None
