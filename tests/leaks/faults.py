"""Raises errors whose text is a row, at any function of the product that a request passes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = tuple(str(ROOT / name) + "/" for name in ("client", "common"))
SPARED = "__exit__"  # closes the file whose lock the next request waits for, and does nothing else
Answer = Callable[[bytes], bytes]


def name_of(code: CodeType) -> str:
    """A function's name, by its file."""
    return f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_qualname}"


@contextmanager
def traced(on_call: Callable[[CodeType], None]) -> Iterator[None]:
    """Tell of every call of a function of the product in this thread.

    What the listener raises, the function raises; Python ends the tracing there.
    """

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(FOLDERS):
            on_call(frame.f_code)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def passed_by(answer: Answer, frame: bytes) -> list[str]:
    """Functions that a request passes, in order, each once."""
    found: dict[str, None] = {}
    with traced(lambda code: found.setdefault(name_of(code))):
        answer(frame)
    return [name for name in found if not name.endswith((">", SPARED))]


def failing_at(answer: Answer, point: str, error: Callable[[], Exception]) -> Answer:
    """The same answer, but the first call of this function raises."""

    def spill(code: CodeType) -> None:
        if name_of(code) == point:
            raise error()

    def faulty(frame: bytes) -> bytes:
        with traced(spill):
            return answer(frame)

    return faulty
