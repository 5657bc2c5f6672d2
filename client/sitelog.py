"""A site's own log of what went wrong; the only place where the reason behind a reference is told."""

import json
import time
import traceback
from pathlib import Path
from typing import Any

from common.errors import SilotuneError
from common.storage import storage_error


def report(path: Path, reference: str, error: Exception) -> None:
    """Append one failure: the message of an error of ours, else only the error's type and the code lines it passed.

    The message of a foreign error may hold a row's text, so it is not written anywhere.

    Raises:
        StorageError: The log cannot be written.
    """
    entry: dict[str, Any] = {"time": round(time.time(), 3), "reference": reference, "error": type(error).__name__}
    if isinstance(error, SilotuneError):
        entry["message"] = str(error)
    else:
        entry["at"] = places(error)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as failure:
        raise storage_error(path, failure) from failure


def places(error: BaseException) -> list[str]:
    """The code lines that an error passed: all that may be written of one that is not ours."""
    return [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
