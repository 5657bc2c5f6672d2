"""The moving lines of a run on a terminal: rounds, sites, steps, time left, loss and epsilon; drawn from events."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.event_kinds import Event
from server.view.round_rows import Row

BAR_COLUMNS: Final = 20
REFRESHES_A_SECOND: Final = 2  # the cores are the training's


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
        >>> duration(59.6), duration(3723)
        ('1:00', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass
class Progress:
    """Where a run is; `take` follows its events, of which some are told and never written.

    Attributes:
        clock: Unix seconds.
    """

    clock: Callable[[], float] = time.time
    _num_rounds: int = 0
    _first_round: int = 0
    _round: int = 0
    _began: float | None = None
    _what: str = ""
    _sites: Sequence[str] = ()
    _done: list[str] = field(default_factory=list)
    _num_steps: dict[str, int] = field(default_factory=dict)
    _at: dict[str, tuple[int, int]] = field(default_factory=dict)
    _left_s: float | None = None
    _left_at: float = 0.0
    _row: Row | None = None

    def take(self, event: Event) -> None:
        """Follow one event; those that say nothing of it are passed over."""
        kind = event["kind"]
        if kind == "run_started":
            self._num_rounds, self._first_round = event["num_rounds"], event.get("first_round", 0)
            self._round, self._began, self._left_s = self._first_round, None, None
        elif kind == "site_joined":
            self._num_steps[event["site"]] = event["num_steps"] or 1
        elif kind == "round_started":
            self._round, self._what = event["round"], "training"
            self._begin(event["sites"])
            self._began = event["time"] if self._began is None else self._began
        elif kind == "evaluation_started":
            self._what = "evaluating"
            self._begin(event["sites"])
        elif kind == "site_step":
            self._at = {event["site"]: (event["step"], event["num_steps"])}
        elif kind in ("site_trained", "site_evaluated", "site_failed"):
            self._done += [event["site"]] if event["site"] in self._sites else []
            self._at.pop(event["site"], None)
        elif kind == "round_finished":
            self._round, self._what, self._sites, self._done = event["round"] + 1, "evaluating", (), []
        if kind in ("site_step", "site_trained", "site_failed", "round_finished"):
            self._estimate(event["time"])

    def note(self, row: Row) -> None:
        """The figures that are known last."""
        self._row = row

    def share(self) -> float:
        """How much of the rounds that are to play is done, from 0 to 1."""
        total = max(self._num_rounds - self._first_round, 1)
        return min(1.0, (self._round - self._first_round + self._share_of_round()) / total)

    def left_s(self) -> float | None:
        """Seconds until the last round is over, as the pace was; None before there is one."""
        return None if self._left_s is None else max(0.0, self._left_s - (self.clock() - self._left_at))

    def lines(self, width: int) -> tuple[str, str]:
        """The figures behind the bar, and who is at work; the latter in at most `width` columns."""
        left = self.left_s()
        parts = [f"{100 * self.share():.0f} %", "" if left is None else f"{duration(left)} left"]
        if self._row:
            loss, epsilon = self._row.held_out_loss, self._row.epsilon
            parts.append("" if loss is None else f"held-out {loss:.3f}")
            parts.append("" if epsilon is None else f"epsilon {epsilon:.2f}")
        return "  ".join(filter(None, parts)), _cut(self._who(width), width)

    def title(self) -> str:
        """The round that is played."""
        return f"round {min(self._round + 1, self._num_rounds)}/{self._num_rounds}"

    def _who(self, width: int) -> str:
        """What goes on at which sites."""
        at = ", ".join(f"{site} step {step}/{total}" for site, (step, total) in self._at.items())
        if not self._sites:
            return f"{self._what} {at}".strip()
        told = f"{self._what}: {len(self._done)} of {len(self._sites)} sites done"
        waiting = ", ".join(site for site in self._sites if site not in self._done)
        fits = len(told) + len(waiting) + 11 <= width
        return f"{told}; at work: {at or waiting}" if at or (waiting and fits) else told

    def _begin(self, sites: Sequence[str]) -> None:
        """A step of all sites."""
        self._sites, self._done, self._at = sites, [], {}

    def _share_of_round(self) -> float:
        """Of the round's training, by its steps."""
        total = sum(self._num_steps.get(site, 1) for site in self._sites)
        if self._what != "training" or not total:
            return 0.0
        whole = sum(self._num_steps.get(site, 1) for site in self._done)
        part = sum(self._num_steps.get(site, 1) * step / max(of, 1) for site, (step, of) in self._at.items())
        return min(1.0, (whole + part) / total)

    def _estimate(self, now: float) -> None:
        """The time left by the time that went, whenever something was done."""
        share = self.share()
        if self._began is not None and share > 0 and now > self._began:
            self._left_s, self._left_at = (now - self._began) * (1 - share) / share, now


class Moving:
    """The lines on a terminal, at its bottom; nothing elsewhere."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress, self._text = console, progress, ""
        self._live: Live | None = None

    def show(self, text: str = "") -> None:
        """Draw what the progress says, or only this text where it is given."""
        self._text = text
        if self._live is None and self._console.is_terminal and not self._console.quiet:
            self._live = Live(
                get_renderable=self._draw,
                console=self._console,
                refresh_per_second=REFRESHES_A_SECOND,
                transient=True,
            )
            self._live.start()

    def stop(self) -> None:
        """Take the lines away and give the cursor back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> Table:
        """One or two lines, never wider than the terminal."""
        table = Table.grid(expand=False)
        width = self._console.width
        if self._text:
            table.add_row(Text(_cut(self._text, width), no_wrap=True))
            return table
        figures, who = self._progress.lines(width)
        bar = ProgressBar(total=1.0, completed=self._progress.share(), width=BAR_COLUMNS)
        first = Table.grid(padding=(0, 2))
        first.add_row(Text(self._progress.title(), style="bold"), bar, Text(figures, no_wrap=True, overflow="ellipsis"))
        table.add_row(first)
        table.add_row(Text(who, style="dim", no_wrap=True))
        return table


def _cut(text: str, width: int) -> str:
    """Text of at most so many columns."""
    return text if len(text) <= width else f"{text[: width - 3]}..."
