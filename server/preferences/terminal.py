"""Blind ranking in a terminal: one task a screen, one key an answer."""

import sys
import unicodedata
from typing import Final

import click
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.errors import ConfigError
from server.preferences.answers import Choice, Session
from server.preferences.files import Turns

KEYS: Final[dict[str, Choice]] = {"1": "left", "2": "right", "=": "tie", "s": "skip"}
HELP: Final = "1  answer 1 is better    2  answer 2 is better    =  tie    s  skip    u  undo    q  quit"
LONG: Final = "Longer than this window: scroll up for its beginning, or use --web."
HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co"})  # Unicode categories
MIN_WIDTH_SIDE_BY_SIDE: Final = 100


def run(session: Session) -> None:
    """Rank until all tasks are answered or the rater quits; every answer is on the disk at once.

    Raises:
        ConfigError: This is no terminal.
        StorageError: An answer could not be written.
    """
    console = Console(highlight=False)
    if not console.is_terminal or not sys.stdin.isatty():
        raise ConfigError("ranking needs a terminal; run it in one, or add --web for a page in the browser")
    note = ""
    while True:
        console.clear()
        view = screen(session, width=console.width, note=note)
        if len(console.render_lines(view, pad=False)) > console.height:
            view = screen(session, width=console.width, note=f"{note} {LONG}".strip())
        console.print(view)
        key = click.getchar().lower()
        if key in ("q", "\x03", "\x04"):
            console.clear()
            return
        note = press(session, key)


def press(session: Session, key: str) -> str:
    """Do what a key asks for.

    Args:
        session: Is changed.

    Returns:
        What to tell the rater; "" if nothing.

    Raises:
        StorageError: The answer could not be written.
    """
    task = session.current
    if key == "u":
        if session.last is None:
            return "There is nothing to undo."
        session.undo()
        return "Taken back."
    if key in KEYS and task is not None:
        session.answer(task.number, KEYS[key])
        return ""
    return "" if task is None else "Press one of the keys below."


def screen(session: Session, *, width: int, note: str = "") -> RenderableType:
    """What a rater sees: progress, prompt, two answers, keys.

    Args:
        width: Of the terminal, in columns; at 100 and more the answers stand side by side.
    """
    task, total = session.current, len(session.tasks)
    head = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=total, completed=session.num_done, width=min(30, width // 3))
    head.add_row(Text(f"{session.num_done} of {total} answered", style="bold"), bar)
    keys = Text(HELP if task else "u  undo    q  quit", style="bold")
    shown: list[RenderableType] = [Text("\nAll tasks are answered, and every answer is kept.\n")]
    if task:
        is_wide = width >= MIN_WIDTH_SIDE_BY_SIDE
        side = (width - 1) // 2 if is_wide else width
        panels = [
            Panel(_text(turns), title=f"Answer {number}", title_align="left", width=side, border_style="cyan")
            for number, turns in ((1, task.left), (2, task.right))
        ]
        answers: list[RenderableType] = [Columns(panels, padding=(0, 1))] if is_wide else [*panels]
        shown = [Panel(_text(task.prompt), title=f"Task {task.number}: prompt", title_align="left"), *answers]
    return Group(head, *shown, Text(note, style="yellow"), keys)


def _text(turns: Turns) -> Text:
    """Turns as text; several are labelled with their roles."""
    if len(turns) == 1:
        return Text(visible(turns[0].content))
    shown = Text()
    for number, turn in enumerate(turns):
        shown.append("\n\n" if number else "").append(f"{turn.role}: ", style="bold").append(visible(turn.content))
    return shown


def visible(text: str) -> str:
    """Text in which no control character can move the cursor or hide words.

    Example:
        >>> visible("red: \\x1b[31m, line\\nbreak")
        'red: \\ufffd[31m, line\\nbreak'
    """
    return "".join(sign if sign in "\n\t" or unicodedata.category(sign) not in HIDDEN else "\ufffd" for sign in text)
