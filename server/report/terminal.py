"""A run in the terminal, drawn from its events: the plan, one line a round, and what went wrong."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from common.data import overlap
from common.event_kinds import Event
from common.frame import site_states
from server.report.progress import Moving, Progress, duration
from server.view import by_precision, export, gate, round_rows
from server.view import figures as view
from server.view import polish as told
from server.view.round_rows import Row, Rows

MAX_NAMED: Final = 12  # sites of a run that are shown one by one; more are counted
INDENT: Final = 12  # columns of a line's head, under which the rest of a long one stands
NOTES_INDENT: Final = 8  # under the column `round`
_JOINING: Final = ("site_joined", "site_refused")
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def size(num_bytes: float) -> str:
    """Bytes for people, decimal units.

    Example:
        >>> size(1536)
        '1.5 kB'
    """
    power = 0
    while num_bytes >= 1000 and power < len(_UNITS) - 1:
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{num_bytes:.0f} B" if not power else f"{num_bytes:.1f} {_UNITS[power]}"


def percent(share: float | None) -> str:
    """A share as a percentage; `-` if there is none.

    Example:
        >>> percent(0.314)
        '31.4 %'
    """
    return "-" if share is None else f"{100 * share:.1f} %"


@dataclass
class Screen:
    """Listens to events and prints; on a terminal moving lines say who is at work, and long lines are broken at words.

    Attributes:
        console: Where to print.
    """

    console: Console
    _joined: dict[str, Event] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)
    _num_told: int = 0
    _columns: list[str] = field(default_factory=list)
    _rows: Rows = field(default_factory=Rows)
    _progress: Progress = field(default_factory=Progress)
    _num_rounds: int = 0
    _gap_warning: float = 0.0
    _without_gap: str = ""
    _has_header: bool = False
    _has_epsilon: bool = False
    _num_large_gaps: int = 0
    _evaluation_down: int = 0
    _precisions: list[Event] = field(default_factory=list)
    _overlap: Event | None = None

    def __post_init__(self) -> None:
        """The moving lines are of this console."""
        self._moving = Moving(self.console, self._progress)

    def __call__(self, event: Event) -> None:
        """Take one event; kinds without a method of their own are not shown."""
        if event["kind"] not in _JOINING:
            self._tell_joined()
        self._progress.take(event)
        row = self._rows.take(event)
        if row and event["kind"] != "evaluated":
            self._row(row, [])
        elif row:
            self._evaluated(row, event)
        show = getattr(self, f"_on_{event['kind']}", None)
        if show:
            show(event)

    def _on_run_started(self, event: Event) -> None:
        """The plan."""
        self._num_rounds, self._gap_warning = event["num_rounds"], event["gap_warning"]
        self._without_gap = event["without_gap"]
        trained, base = event["num_trained_parameters"], event["num_base_parameters"]
        run = event["run_sha256"][:12]
        self._print(f"[bold]{event['name']}[/]  {event['num_rounds']} rounds, {event['method']}, run {run}")
        precision = _escape(by_precision.quantization(event))
        self._print(f"  base      {_escape(event['base'])}, {base:,} parameters, {precision}")
        share = percent(trained / base)
        self._print(f"  adapter   {trained:,} parameters trained ({share}), {event['num_tensors']} tensors")
        down, up = event["bytes_down_per_site"], event["bytes_up_per_site"]
        scored = event.get("bytes_evaluation_per_site", down)
        more = f"evaluation {size(scored)} down" if scored else "what is evaluated is not sent again"
        self._print(f"  traffic   {size(down)} down and {size(up)} up, a site and round; {more}")
        self._privacy(event)
        self._print(f"  bad sites {event['guarding']}")

    def _on_overlap(self, event: Event) -> None:
        """Held-out rows whose text is trained on; said again beside the last figures."""
        self._overlap = event
        self._tell_overlap()

    def _tell_overlap(self) -> None:
        """Whether held-out figures are of rows that are new to the adapter."""
        if self._overlap:
            style = "[yellow]" if overlap.num_same(self._overlap) else ""
            self._print(f"  held out  {style}{overlap.sentence(self._overlap)}{'[/]' if style else ''}")

    def _privacy(self, event: Event) -> None:
        """What the plan promises to a unit or a site."""
        if event["privacy"] == "none":
            self._print("  privacy   [yellow]none: updates leave the sites unprotected[/]")
            return
        curve = event["epsilon_planned"]
        self._has_epsilon = True
        self._print(
            f"  privacy   epsilon {curve[-1]:.2f} at delta {event['dp_delta']:g} after the last round, "
            f"{curve[0]:.2f} after the first; noise multiplier {event['noise_multiplier']:.3f}"
        )
        self._print(f"            {event['privacy_wording']}")
        if "noise_ratio" in event:
            accepted = ", which was accepted" if event["noise_accepted"] else ""
            self._print(f"            noise to signal {event['noise_ratio']:.2f}{accepted}")

    def _on_warned(self, event: Event) -> None:
        """What to know before relying on the result."""
        self._print(f"  [yellow]warning[/]   {_escape(event['reason'])}")

    def _on_tasks_overlap(self, event: Event) -> None:
        """Tasks whose rows the sites train on."""
        for reason in event["reasons"]:
            self._print(f"  [yellow]warning[/]   {_escape(reason)}")

    def _on_site_joined(self, event: Event) -> None:
        """A site and its rows; of many sites, how many there are by now."""
        if event["site"] in self._joined:
            return
        self._joined[event["site"]] = event
        if len(self._joined) > MAX_NAMED:
            self._moving.show(f"joined: {len(self._joined)} sites")
            return
        self._num_told += 1
        self._print(f"  site      {_escape(event['site'])}: {_num_rows([event])}, {event['num_steps']} steps a round")

    def _tell_joined(self) -> None:
        """All sites in one line, once they are there, if some came that have no line of their own."""
        if self._num_told < len(self._joined):
            self._num_told = len(self._joined)
            self._print(f"  joined    {self._num_told} sites: {_num_rows(self._joined.values())}")

    def _on_site_refused(self, event: Event) -> None:
        """A node that does not take part."""
        who = str(event.get("site", f"node {event['node']}"))
        if self._refused.get(who) == event["reason"]:  # it is asked before every round
            return
        self._refused[who] = event["reason"]
        colour = "yellow" if event.get("state") in site_states.PENDING else "red"
        self._print(f"  [{colour}]site[/]      {_escape(who)}: {_escape(_with_state(event))}")

    def _on_round_started(self, event: Event) -> None:
        """Who trains now."""
        self._moving.show()

    def _on_evaluation_started(self, event: Event) -> None:
        """Who is asked now."""
        self._moving.show()

    def _on_arm_started(self, event: Event) -> None:
        """Another arm of a comparison."""
        self._moving.show(f"arm {event['arm']}")

    def _on_arm_step(self, event: Event) -> None:
        """Where that arm is."""
        self._moving.show(f"arm {event['arm']}: round {event['round'] + 1}, step {event['step']}/{event['num_steps']}")

    def _on_compared(self, event: Event) -> None:
        """All arms are through."""
        self._moving.stop()

    def _on_site_failed(self, event: Event) -> None:
        """An answer that does not count."""
        self._print(f"  [red]{_escape(event['site'])}[/] {event['step']}: {_escape(_with_state(event))}")

    def _on_site_skipped(self, event: Event) -> None:
        """A site that fell silent and is not waited for."""
        self._print(f"  [yellow]{_escape(event['site'])}[/] away: {_escape(event['reason'])}")

    def _on_screened(self, event: Event) -> None:
        """Updates that do not look like the others."""
        for site, seen in event["sites"].items():
            if seen["reasons"]:
                did = "left out" if seen["is_left_out"] else "kept"
                self._print(f"  [red]{_escape(site)}[/] screening, {did}: {_escape('; '.join(seen['reasons']))}")

    def _on_round_finished(self, event: Event) -> None:
        """Sites that claimed too much; the figures are shown with the held-out loss."""
        for site in event["held_to_share"]:
            self._print(f"  [yellow]{_escape(site)} claims more rows than its share of a round; held to that share[/]")

    def _on_base_noise(self, event: Event) -> None:
        """How far each precision is from the files; shown with the losses at the end."""
        self._precisions = [event]

    def _evaluated(self, row: Row, event: Event) -> None:
        """A row of the table with its held-out figures."""
        self._precisions += [event]
        self._progress.note(row)
        self._row(row, self._notes(event))
        if event["num_rounds"] == self._num_rounds:
            self._evenness(event)

    def _row(self, row: Row, notes: list[str]) -> None:
        """One line of the table, and under it what has no column."""
        self._header()
        cells = [f"{row.num_rounds:>6}", _cell(row.held_out_loss, width=8)]
        cells += [_cell(row.train_losses.get(site), width=_width(site)) for site in self._columns]
        cells += _figures(row)
        if self._has_epsilon:
            cells.append(f"{'-' if row.epsilon is None else format(row.epsilon, '.2f'):>7}")
        self.console.print(Text("  ".join(cells)), soft_wrap=True)
        under = [] if self._columns else [self._trained(row)]
        if (row.gap or 0.0) > self._gap_warning:
            self._num_large_gaps += 1
            under.append("[yellow]large gap[/]")
        if row.gap_error:
            under.append(f"gap ± {percent(row.gap_error)}")
        if row.gap_most:
            module, share, error = row.gap_most
            told = f" ± {percent(error)}" if error else ""
            under.append(f"gap mostly in {_escape(module)}, {percent(share)}{told}")
        self._under([note for note in [*under, *notes] if note])

    def _under(self, notes: list[str]) -> None:
        """Notes under a row: as many to a line as fit."""
        lines: list[str] = []
        for note in notes:
            if lines and Text.from_markup(f"{lines[-1]}; {note}").cell_len + NOTES_INDENT <= self.console.width:
                lines[-1] += f"; {note}"
            else:
                lines.append(note)
        for line in lines:
            self._print(" " * NOTES_INDENT + line)

    def _trained(self, row: Row) -> str:
        """The sites' training losses where they have no columns: each, or if they are many the best and the worst."""
        losses = {site: loss for site, loss in sorted(row.train_losses.items()) if loss is not None}
        each = ", ".join(f"{site} {loss:.3f}" for site, loss in losses.items())
        told = each if NOTES_INDENT + len(f"train {each}") <= self.console.width else round_rows.in_brief(losses)
        return f"train {_escape(told)}" if told else ""

    def _on_not_evaluated(self, event: Event) -> None:
        """No site tells held-out figures, or none any more; the coordinator may have some of its own."""
        own = "" if event.get("server_loss") is None else f"; {event['server_loss']:.3f} on the coordinator's own rows"
        place = event["stage"] if "stage" in event else f"{event['num_rounds']} rounds"
        reason = event.get("reason", "no site tells held-out figures")
        self._print(f"  no figures after {_escape(place)}: {_escape(reason)}{own}")

    def _evenness(self, event: Event) -> None:
        """How the sites fare at the end."""
        if even := view.evenness(event):
            self._print(f"  sites     {_escape(even)}")
        for row in by_precision.table(self._precisions):
            self._print(f"  precision {_escape(by_precision.line(row))}")
        for site in event["outliers"]:
            loss = event["sites"][site]["loss"]
            self._print(f"  [yellow]{_escape(site)} tells a loss of {loss:.3g}, which is far from the other sites'[/]")
        if event["worse_than_base"]:
            self._print(f"  [yellow]worse than the base: {_escape(view.worse(event))}[/]")
        self._tell_overlap()

    def _on_measured(self, event: Event) -> None:
        """The coordinator's tasks at one stage, and how far they are from base and prompt-only."""
        self._print(f"  [bold]{event['stage']}[/]")
        for line in view.lines(event):
            self._print(f"    {_escape(line)}")

    def _on_derived(self, event: Event) -> None:
        """Stages after the end of a run."""
        for line in told.derived_in_words(event):
            self._print(f"  {_escape(line)}")

    def _on_polish_started(self, event: Event) -> None:
        """A stage and its rows."""
        rows = f"{event['num_rows']:,} rows to train, {event['num_held_out']:,} held out{told.left_out(event)}"
        self._print(
            f"  polish    {event['number']}/{event['num_stages']} {event['stage']} ({told.kind(event)}): {rows}"
        )
        self._moving.show(f"polish {event['stage']}")

    def _on_polish_step(self, event: Event) -> None:
        """Where a stage is."""
        self._moving.show(f"polish {event['stage']}: step {event['step']}/{event['num_steps']}")

    def _on_polish_finished(self, event: Event) -> None:
        """A stage's figures before and after."""
        self._moving.stop()
        self._print(f"            {told.line(event)}, {event['num_steps']} steps, {event['seconds']:.1f} s")
        for line in told.overlaps(event):
            self._print(f"            [yellow]{_escape(line)}[/]")

    def _on_polish_evaluated(self, event: Event) -> None:
        """What the sites say of a stage's adapter."""
        self._print(f"  sites     after {_escape(event['stage'])}: held-out {event['loss']:.3f}")
        self._under(self._notes(event))
        self._evenness(event)

    def _on_gated(self, event: Event) -> None:
        """What the gate says of one adapter."""
        self._print(f"  [bold]gate, {event['stage']}: {'passed' if event['is_passed'] else '[red]refused[/]'}[/]")
        for verdict in event["verdicts"]:
            self._print(f"    {_escape(gate.line(verdict))}")

    def _on_gated_later(self, event: Event) -> None:
        """What rules that came after the end say."""
        for line in gate.later([event]):
            self._print(f"  {_escape(line)}")

    def _on_exported(self, event: Event) -> None:
        """The sealed folder, and how near its formats are to the adapter."""
        for place, line in enumerate(export.summary([event])):
            self._print(f"  {'[bold]export[/]   ' if not place else '  '} {_escape(line)}")

    def _on_stopped(self, event: Event) -> None:
        """The rounds end early."""
        self._print(f"[yellow]rounds end after {event['num_rounds']}: {_escape(event['reason'])}[/]")

    def _on_run_finished(self, event: Event) -> None:
        """The end."""
        self._moving.stop()
        if self._num_large_gaps:
            self._print(
                f"[yellow]The gap passed {percent(self._gap_warning)} in {self._num_large_gaps} of the rounds: "
                "the mean of the factors was that far from the mean of the updates. Fewer local steps a round bring it "
                "down"
                f"{self._remedy()}.[/]"
            )

    def _remedy(self) -> str:
        """The method without that error, if the run's other settings allow one."""
        return f"; aggregation.method = '{self._without_gap}' has none" if self._without_gap else ""

    def _on_run_failed(self, event: Event) -> None:
        """The end, too early."""
        self._moving.stop()

    def _header(self) -> None:
        """Column names, once; each site has a column if all fit."""
        if self._has_header:
            return
        self._has_header = True
        names = [f"{'round':>6}", f"{'held-out':>8}"]
        figures = [f"{'gap':>7}", f"{'down':>8}", f"{'up':>8}", f"{'time':>8}"]
        figures += [f"{'epsilon':>7}"] if self._has_epsilon else []
        sites = [f"{site:>{_width(site)}}" for site in sorted(self._joined)]
        if len("  ".join([*names, *sites, *figures])) <= self.console.width:
            self._columns, names = sorted(self._joined), [*names, *sites]
        self._print("")
        self.console.print(Text("  ".join([*names, *figures]), style="bold"), soft_wrap=True)

    def _notes(self, event: Event) -> list[str]:
        """What a reader should not miss of an evaluation, a line each."""
        notes = []
        if (down := event.get("bytes_down")) and down != self._evaluation_down:  # as a rule every one has as many
            self._evaluation_down = down
            notes.append(f"evaluation {size(down)} down")
        if event.get("accuracy") is not None:
            notes.append(f"agrees with {percent(event['accuracy'])}, answers {event['answer_loss']:.3f}")
        if event["server_loss"] is not None:
            notes.append(f"coordinator's rows {event['server_loss']:.3f}")
        if self._overlap and (count := overlap.num_same(self._overlap)):
            notes.append(f"[yellow]{count} held-out rows are trained on[/]")
        if event["worse_than_base"]:
            notes.append(f"[yellow]worse than the base: {len(event['worse_than_base'])} sites[/]")
        if event["stale"]:
            notes.append(f"[yellow]stale: {_escape(', '.join(event['stale']))}[/]")
        return notes

    def _print(self, markup: str) -> None:
        """A line; on a terminal that is too narrow for it, broken at words, with the rest under the first words."""
        text, breaks, column = Text.from_markup(markup), list[int](), 0
        for word in re.finditer(r"\S+\s*", text.plain) if self.console.is_terminal else ():
            if word.start() > INDENT and column + len(word[0].rstrip()) > self.console.width:
                breaks.append(word.start())
                column = INDENT
            column = max(column, word.start() if not breaks else column) + len(word[0])
        for place, line in enumerate(text.divide(breaks)):
            line.rstrip()
            self.console.print(Text(" " * INDENT if place else "") + line, soft_wrap=True, highlight=False)


def _with_state(event: Event) -> str:
    """Why a site does not take part, with its state before it unless the reason begins with that."""
    state, reason = str(event.get("state", "")), str(event["reason"])
    return reason if reason.startswith(state) else f"{state}: {reason}"


def _num_rows(joined: Collection[Event]) -> str:
    """How many rows sites have together, and what did not fit."""
    names = ("num_examples", "num_held_out", "num_truncated", "num_dropped")
    train, held_out, cut, dropped = (sum(event[name] or 0 for event in joined) for name in names)
    lost = f", {cut:,} cut, {dropped:,} dropped as too long or equal after the cut" if cut or dropped else ""
    return f"{train:,} rows to train, {held_out:,} held out{lost}"


def _figures(row: Row) -> list[str]:
    """Gap, bytes and time of a round; blank for the base."""
    if row.bytes_down is None or row.bytes_up is None or row.seconds is None:
        return [f"{'-':>7}", f"{'-':>8}", f"{'-':>8}", f"{'-':>8}"]
    time = f"{row.seconds:.1f} s" if row.seconds < 100 else duration(row.seconds)
    return [f"{percent(row.gap):>7}", f"{size(row.bytes_down):>8}", f"{size(row.bytes_up):>8}", f"{time:>8}"]


def _cell(value: float | None, *, width: int) -> str:
    """A loss, right-aligned."""
    return f"{'-' if value is None else format(value, '.3f'):>{width}}"


def _width(site: str) -> int:
    """Width of a site's column."""
    return max(6, len(site))


def _escape(text: Any) -> str:
    """Text from elsewhere, safe within markup."""
    from rich.markup import escape

    return escape(str(text))
