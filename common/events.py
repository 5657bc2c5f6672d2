"""The run's truth: an append-only `events.jsonl` from which terminal, status, report, card and gate are drawn."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from common import event_kinds
from common.errors import DataError
from common.event_kinds import End, Event
from common.journal import Journal

FILE: Final = "events.jsonl"  # in a run's folder
INTERRUPTED: Final = "Interrupted"  # the `error` of a `RunFailed` that somebody asked for
MAX_NAMED: Final = 8  # damaged lines in a message
MARK_BYTES: Final = 64  # before where a reader stopped, by which it knows the file again
E = TypeVar("E", bound=Event)


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

    def append(self, event: E) -> E:
        """Write an event with the time of now, and return it.

        Raises:
            StorageError: The line could not be written.
            ValueError: A number is not finite.
        """
        event = dataclasses.replace(event, time=round(self.clock(), 3), line="")
        line = json.dumps(event.as_dict(), ensure_ascii=False, allow_nan=False) + "\n"
        with closing(
            Journal(self.path, mode=None, lock="none")
        ) as file:  # a run's writers share the lock of its folder
            file.append(line.encode(errors="replace"))
        for listener in self.listeners:
            listener(event)
        return event

    def tell(self, event: Event) -> None:
        """Tell those who watch, and write nothing."""
        for watcher in self.watchers:
            watcher(dataclasses.replace(event, time=round(self.clock(), 3)))


@dataclass
class Tail:
    """Reads a log as it grows: each look reads what was added since the last one.

    A last line without its end is left for the next look. A log that was truncated or replaced is read from its begin.

    Attributes:
        path: The log; need not be there yet.
        damaged: Numbers of the lines that are no events, from 1.
        num_starts: How often the log was read from its begin.
    """

    path: Path
    damaged: list[int] = field(default_factory=list)
    num_starts: int = 0
    _file_id: tuple[int, int] = (0, 0)
    _offset: int = 0
    _mark: bytes = b""
    _num_lines: int = 0

    def look(self) -> list[Event]:
        """The events since the last look."""
        try:
            with self.path.open("rb") as file:
                lines = self._added(file).split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        fresh = []
        for line in lines:
            self._num_lines += 1
            try:
                fresh.append(event_kinds.parse(line))
            except ValueError:
                self.damaged.append(self._num_lines)
        return fresh

    def _added(self, file: BinaryIO) -> bytes:
        """The whole lines that were added; of a file that is not as it was left, all."""
        status = os.fstat(file.fileno())
        file.seek(self._offset - len(self._mark))
        data = file.read()
        if (status.st_dev, status.st_ino) == self._file_id and data.startswith(self._mark):
            data = data[len(self._mark) :]
        else:
            self._file_id, self._offset, self._mark, self._num_lines = (status.st_dev, status.st_ino), 0, b"", 0
            self.damaged.clear()
            self.num_starts += 1
            file.seek(0)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._mark = (self._mark + whole)[-MARK_BYTES:]
        return whole


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
    tail = Tail(path)
    return tail.look(), tail.damaged


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

    Raises:
        DataError: A line is not an event.
    """
    tail = Tail(path)
    while True:
        ended = is_over()
        fresh = tail.look()
        if tail.damaged:
            raise DataError(in_words(path, tail.damaged))
        fresh, num_skipped = fresh[num_skipped:], max(0, num_skipped - len(fresh))
        yield from fresh
        if ended or any(isinstance(event, End) for event in fresh):
            return
        time.sleep(poll_s)
