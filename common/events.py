"""The run's truth: an append-only `events.jsonl` from which terminal, report and dashboard are drawn."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from common.errors import DataError
from common.storage import storage_error

FILE: Final = "events.jsonl"  # in a run's folder
ENDS: Final = ("run_finished", "run_failed")
INTERRUPTED: Final = "Interrupted"  # the `error` of a `run_failed` that somebody asked for

MAX_NAMED: Final = 8  # damaged lines in a message

Event = dict[str, Any]


@dataclass
class EventLog:
    """Appends events to a file and tells listeners.

    Attributes:
        path: The file; created with its folder by the first event.
        listeners: Called with every event after it is on disk.
        watchers: Called with what only a person who watches needs, such as a step; it is never written.
        clock: Seconds since the epoch.
    """

    path: Path
    listeners: list[Callable[[Event], None]] = field(default_factory=list)
    watchers: list[Callable[[Event], None]] = field(default_factory=list)
    clock: Callable[[], float] = time.time

    def append(self, kind: str, **fields: Any) -> Event:
        """Write one event: `kind`, `time` (seconds since the epoch) and the fields given.

        Raises:
            StorageError: The line could not be written.
        """
        event: Event = {"kind": kind, "time": round(self.clock(), 3), **fields}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                _drop_cut_line(file)
                file.write(line.encode(errors="replace"))
        except OSError as error:
            raise storage_error(self.path, error) from error
        for listener in self.listeners:
            listener(event)
        return event

    def tell(self, kind: str, **fields: Any) -> None:
        """Tell those who watch, and write nothing."""
        for watcher in self.watchers:
            watcher({"kind": kind, "time": round(self.clock(), 3), **fields})


def read(path: Path) -> list[Event]:
    """All whole lines of an event file; a last line cut by a crash is left out.

    Raises:
        DataError: The file is missing, or a line before the last is not an event.
    """
    found, damaged = read_damaged(path)
    if damaged:
        raise DataError(in_words(path, damaged))
    return found


def read_damaged(path: Path) -> tuple[list[Event], list[int]]:
    """What can be read of an event file, and the numbers of the lines that cannot, from 1.

    For showing a run only: what goes on from events needs all of them.

    Raises:
        DataError: The file is missing.
    """
    if not path.is_file():
        raise DataError(f"{path}: no events here; is this a run folder?")
    found, damaged = list[Event](), list[int]()
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            found.append(_event(line))
        except ValueError:
            damaged.append(number)
    return found, damaged


def in_words(path: Path, damaged: Sequence[int]) -> str:
    """What to do about lines that cannot be read."""
    lines = ", ".join(map(str, damaged[:MAX_NAMED])) + (", ..." if len(damaged) > MAX_NAMED else "")
    commands = "; ".join(f"{number}d" for number in damaged[:MAX_NAMED])
    return (
        f"{path}: line {lines} is not a JSON event; put the file back from a copy, or remove the line, whose event is "
        f"then lost: sed -i '{commands}' {path}. Until then silotune-server status shows what can be read"
    )


def follow(path: Path, *, is_over: Callable[[], bool], num_skipped: int = 0, poll_s: float = 0.2) -> Iterator[Event]:
    """Events as they arrive, until `run_finished`, `run_failed`, or `is_over()` with nothing left to read.

    Args:
        path: The event file; need not be there yet.
        is_over: Whether nobody writes any more.
        num_skipped: Events at the start to pass over: those of an earlier try.
        poll_s: Seconds between looks.
    """
    num_seen = num_skipped
    while True:
        ended = is_over()
        fresh = read(path)[num_seen:] if path.is_file() else []
        num_seen += len(fresh)
        yield from fresh
        if ended or any(event["kind"] in ENDS for event in fresh):
            return
        time.sleep(poll_s)


def _event(line: bytes) -> Event:
    """One line as an event; ValueError if it is none."""
    event = json.loads(line)
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        raise ValueError("not an event")
    return event


def _drop_cut_line(file: BinaryIO) -> None:
    """Remove what an earlier writer left unfinished, or the next event would become part of it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if size and file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
