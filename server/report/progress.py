"""The moving lines of a run on a terminal: rounds, sites, steps, time left, loss and epsilon; drawn from events."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.event_kinds import Event, RoundFinished, RoundStarted, RunStarted, SiteFailed, SiteStep, SiteTrained
from server.view.run_view import TRAINING, RunView

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
    """How far a run is, and when it will be over at the pace so far.

    Attributes:
        view: The run; `take` follows an event that the view has taken.
        clock: Unix seconds.
    """

    view: RunView
    clock: Callable[[], float] = time.time
    _began: float | None = None
    _left_s: float | None = None
    _left_at: float = 0.0

    def take(self, event: Event) -> None:
        """Estimate anew whenever something was done."""
        if isinstance(event, RunStarted):
            self._began = self._left_s = None
        elif isinstance(event, RoundStarted) and self._began is None:
            self._began = event.time
        if isinstance(event, SiteStep | SiteTrained | SiteFailed | RoundFinished) and self._began is not None:
            share = self.share()
            if share > 0 and event.time > self._began:
                self._left_s, self._left_at = (event.time - self._began) * (1 - share) / share, event.time

    def share(self) -> float:
        """How much of the rounds that are to play is done, from 0 to 1."""
        plan, view = self.view.plan, self.view
        first, last = (plan.first_round, plan.num_rounds) if plan else (0, 0)
        of_round = 0.0
        num_steps = {site: view.joined[site].num_steps or 1 if site in view.joined else 1 for site in view.cohort}
        if view.doing == TRAINING and num_steps:
            whole = sum(num_steps[site] for site in view.done)
            part = sum(num_steps.get(site, 1) * step / max(total, 1) for site, (step, total) in view.steps.items())
            of_round = min(1.0, (whole + part) / sum(num_steps.values()))
        return min(1.0, (view.round - first + of_round) / max(last - first, 1))

    def left_s(self) -> float | None:
        """Seconds until the last round is over, as the pace was; None before there is one."""
        return None if self._left_s is None else max(0.0, self._left_s - (self.clock() - self._left_at))

    def lines(self, width: int) -> tuple[str, str]:
        """The figures behind the bar, and who is at work; the latter in at most `width` columns."""
        left = self.left_s()
        parts = [f"{100 * self.share():.0f} %", "" if left is None else f"{duration(left)} left"]
        if last := self.view.last_evaluated:
            epsilon = self.view.rows[last.num_rounds].epsilon
            parts += [f"held-out {last.loss:.3f}", "" if epsilon is None else f"epsilon {epsilon:.2f}"]
        return "  ".join(filter(None, parts)), _cut(self._who(width), width)

    def title(self) -> str:
        """The round that is played."""
        num_rounds = self.view.plan.num_rounds if self.view.plan else 0
        return f"round {min(self.view.round + 1, num_rounds)}/{num_rounds}"

    def _who(self, width: int) -> str:
        """What goes on at which sites."""
        view = self.view
        at = ", ".join(f"{site} step {step}/{total}" for site, (step, total) in view.steps.items())
        if not view.cohort:
            return f"{view.doing} {at}".strip()
        text = f"{view.doing}: {len(view.done)} of {len(view.cohort)} sites done"
        waiting = ", ".join(site for site in view.cohort if site not in view.done)
        fits = len(text) + len(waiting) + 11 <= width
        return f"{text}; at work: {at or waiting}" if at or (waiting and fits) else text


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
