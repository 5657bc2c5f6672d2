"""A site's own log of what went wrong; the only place where the reason behind a reference is told."""

import json
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from client.agent.pressure import Limit
from common.errors import SilotuneError, code_of
from common.frame import site_states
from common.journal import Journal

MAX_A_MINUTE: Final = 120


def reporter(
    path: Path, *, clock: Callable[[], float] = time.time, tell: Callable[[str], None] = lambda line: None
) -> Callable[[str, Exception], None]:
    """A site's `report`: so many failures a minute are told in full, of the rest how many there were.

    Args:
        path: The log.
        clock: Unix seconds.
        tell: Given a line for people too, once for the same again and again, as of a run that waits.
    """
    limit, last = Limit(MAX_A_MINUTE, clock=clock), [""]

    def bounded(reference: str, error: Exception) -> None:
        num_suppressed = limit.take_suppressed()
        if num_suppressed:
            _append(path, {"num_suppressed": num_suppressed})
        if limit.allows():
            report(path, reference, error)
            line = in_words(error)
            if line != last[0]:
                tell(f"{line} (reference {reference})")
            last[0] = line
        elif limit.is_first_suppressed:
            _append(path, {"suppressing": f"more than {MAX_A_MINUTE} failures a minute"})

    return bounded


def in_words(error: Exception) -> str:
    """A line for people: the state that it means for the run, and an error of ours in its own words.

    Example:
        >>> in_words(KeyError("a row's text"))
        'failed: internal error KeyError'
    """
    text = str(error) if isinstance(error, SilotuneError) else f"internal error {type(error).__name__}"
    return f"{site_states.of_code(code_of(error))}: {text}"


def report(path: Path, reference: str, error: Exception) -> None:
    """Append one failure: the message of an error of ours, else only the error's type and the code lines it passed.

    The message of a foreign error may hold a row's text, so it is not written anywhere.

    Raises:
        StorageError: The log cannot be written.
    """
    entry: dict[str, Any] = {"reference": reference, "error": type(error).__name__}
    if isinstance(error, SilotuneError):
        entry["message"] = str(error)
    else:
        entry["at"] = places(error)
    _append(path, entry)


def _append(path: Path, entry: dict[str, Any]) -> None:
    """One line with the time."""
    with closing(Journal(path)) as file:
        file.append(json.dumps({"time": round(time.time(), 3), **entry}).encode() + b"\n")


def places(error: BaseException) -> list[str]:
    """The code lines that an error passed: all that may be written of one that is not ours."""
    return [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
