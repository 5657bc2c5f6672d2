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
    """Tell of every call of a function of the product in this thread; what the listener raises, the function raises."""

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(FOLDERS):
            on_call(frame.f_code)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def passed_by(answer: Answer, frame: bytes, *, failing_at: str = "") -> list[str]:
    """Functions that a request passes, in order, each once; if one of them fails, those that are called after it."""
    found: dict[str, None] = {}
    has_failed = not failing_at

    def note(code: CodeType) -> None:
        nonlocal has_failed
        if has_failed:
            found.setdefault(name_of(code))
        elif name_of(code) == failing_at:
            has_failed = True
            raise ValueError(failing_at)

    with traced(note):
        answer(frame)
    return [name for name in found if not name.endswith((">", SPARED))]


def failing_at(answer: Answer, points: tuple[str, ...], error: Callable[[], Exception]) -> Answer:
    """The same answer, but these functions raise, one after the other, each once."""

    def faulty(frame: bytes) -> bytes:
        waiting = list(points)

        def spill(code: CodeType) -> None:
            if waiting and name_of(code) == waiting[0]:
                del waiting[0]
                raise error()

        with traced(spill):
            return answer(frame)

    return faulty
