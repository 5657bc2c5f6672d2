"""A run in the terminal, drawn from its events: the plan, one line a round, and what went wrong."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.status import Status
from rich.text import Text

from common import site_states
from common.data import overlap
from common.events import Event
from server import export_words, gaps
from server.evaluate import by_precision, view
from server.gate import words
from server.polish import told

MAX_NAMED: Final = 12  # sites of a run that are shown one by one; more are counted
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
    """Listens to events and prints; on a terminal a moving line says who is at work.

    Attributes:
        console: Where to print.
    """

    console: Console
    _joined: dict[str, Event] = field(default_factory=dict)
    _num_told: int = 0
    _columns: list[str] = field(default_factory=list)
    _losses: dict[str, float] = field(default_factory=dict)
    _round: Event = field(default_factory=dict)
    _num_rounds: int = 0
    _gap_warning: float = 0.0
    _without_gap: str = ""
    _status: Status | None = None
    _has_header: bool = False
    _num_large_gaps: int = 0
    _curve: list[float] = field(default_factory=list)
    _precisions: list[Event] = field(default_factory=list)
    _overlap: Event = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        """Take one event; kinds without a method of their own are not shown."""
        if event["kind"] not in _JOINING:
            self._tell_joined()
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
        self._print(f"  traffic   {size(down)} down and {size(up)} up, a site and round; evaluation {size(down)} down")
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
        self._curve = curve = event["epsilon_planned"]
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
            self._set_status(f"joined: {len(self._joined)} sites")
            return
        self._num_told += 1
        self._print(f"  site      {_escape(event['site'])}: {_rows([event])}, {event['num_steps']} steps a round")

    def _tell_joined(self) -> None:
        """All sites in one line, once they are there, if some came that have no line of their own."""
        if self._num_told < len(self._joined):
            self._num_told = len(self._joined)
            self._print(f"  joined    {self._num_told} sites: {_rows(self._joined.values())}")

    def _on_site_refused(self, event: Event) -> None:
        """A node that does not take part."""
        colour = "yellow" if event.get("state") == site_states.WAITS else "red"
        who = _escape(event.get("site", f"node {event['node']}"))
        self._print(f"  [{colour}]site[/]      {who}: {_escape(_with_state(event))}")

    def _on_round_started(self, event: Event) -> None:
        """Who trains now."""
        self._losses = {}
        self._set_status(f"round {event['round'] + 1}/{self._num_rounds}: training at {_named(event['sites'])}")

    def _on_site_trained(self, event: Event) -> None:
        """One update is in."""
        self._losses[event["site"]] = event["train_loss"]
        self._set_status(f"round {event['round'] + 1}/{self._num_rounds}: {_named(self._losses)} done")

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
        """Keep the round's figures until its held-out loss is there."""
        self._round = event
        for site in event["held_to_share"]:
            self._print(f"  [yellow]{_escape(site)} claims more rows than its share of a round; held to that share[/]")
        self._set_status(f"round {event['round'] + 1}/{self._num_rounds}: evaluating")

    def _on_base_noise(self, event: Event) -> None:
        """How far each precision is from the files; shown with the losses at the end."""
        self._precisions = [event]

    def _on_evaluated(self, event: Event) -> None:
        """One line of the table."""
        self._precisions += [event]
        self._header()
        finished = self._round if event["num_rounds"] else {}
        cells = [f"{event['num_rounds']:>6}", f"{event['loss']:>9.3f}"]
        cells += [_cell(self._losses.get(site) if finished else None, width=_width(site)) for site in self._columns]
        cells += _figures(finished)
        notes = self._notes(event, finished)
        self.console.print(Text("  ".join(cells)), Text.from_markup(notes), soft_wrap=True)
        if event["num_rounds"] == self._num_rounds:
            self._evenness(event)

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
        self._set_status(f"polish {event['stage']}")

    def _on_polish_step(self, event: Event) -> None:
        """Where a stage is."""
        self._set_status(f"polish {event['stage']}: step {event['step']}/{event['num_steps']}")

    def _on_polish_finished(self, event: Event) -> None:
        """A stage's figures before and after."""
        self._set_status("")
        self._print(f"            {told.line(event)}, {event['num_steps']} steps, {event['seconds']:.1f} s")
        for line in told.overlaps(event):
            self._print(f"            [yellow]{_escape(line)}[/]")

    def _on_polish_evaluated(self, event: Event) -> None:
        """What the sites say of a stage's adapter."""
        notes = self._notes(event, {})
        self._print(f"  sites     after {_escape(event['stage'])}: held-out {event['loss']:.3f}  {notes}")
        self._evenness(event)

    def _on_gated(self, event: Event) -> None:
        """What the gate says of one adapter."""
        self._print(f"  [bold]gate, {event['stage']}: {'passed' if event['is_passed'] else '[red]refused[/]'}[/]")
        for verdict in event["verdicts"]:
            self._print(f"    {_escape(words.line(verdict))}")

    def _on_gated_later(self, event: Event) -> None:
        """What rules that came after the end say."""
        for line in words.later([event]):
            self._print(f"  {_escape(line)}")

    def _on_exported(self, event: Event) -> None:
        """The sealed folder, and how near its formats are to the adapter."""
        for place, line in enumerate(export_words.summary([event])):
            self._print(f"  {'[bold]export[/]   ' if not place else '  '} {_escape(line)}")

    def _on_stopped(self, event: Event) -> None:
        """The rounds end early."""
        self._print(f"[yellow]rounds end after {event['num_rounds']}: {_escape(event['reason'])}[/]")

    def _on_run_finished(self, event: Event) -> None:
        """The end."""
        self._set_status("")
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
        self._set_status("")

    def _header(self) -> None:
        """Column names, once."""
        if self._has_header:
            return
        self._has_header = True
        if len(self._joined) <= MAX_NAMED:
            self._columns = sorted(self._joined)
        else:
            self._print(f"  {len(self._joined)} sites are too many for columns; the report has each")
        names = [f"{'round':>6}", f"{'held-out':>9}", *(f"{site:>{_width(site)}}" for site in self._columns)]
        names += [f"{'gap':>7}", f"{'down':>9}", f"{'up':>9}", f"{'time':>8}"]
        self._print("")
        self.console.print(Text("  ".join(names), style="bold"), soft_wrap=True)

    def _notes(self, event: Event, finished: Event) -> str:
        """What a reader should not miss."""
        notes = []
        if event.get("bytes_down"):
            notes.append(f"evaluation {size(event['bytes_down'])} down")
        if finished and self._curve:
            notes.append(f"epsilon {finished.get('epsilon', self._curve[event['num_rounds'] - 1]):.2f}")
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
        if finished and (finished["gap"] or 0.0) > self._gap_warning:
            self._num_large_gaps += 1
            notes.append("[yellow]large gap[/]")
        if finished and (error := finished.get("gap_error")):
            notes.append(f"gap ± {percent(error)}")
        if most := gaps.largest(finished):
            notes.append(f"most in {_escape(most[0])}, {percent(most[1])}{f' ± {percent(most[2])}' if most[2] else ''}")
        return "  ".join(notes)

    def _print(self, markup: str) -> None:
        """A line, never wrapped by us."""
        self.console.print(markup, soft_wrap=True, highlight=False)

    def _set_status(self, text: str) -> None:
        """The moving line, on a terminal only."""
        if not self.console.is_terminal:
            return
        if self._status and text:
            self._status.update(_escape(text))
        elif self._status:
            self._status.stop()
            self._status = None
        elif text:
            self._status = self.console.status(_escape(text))
            self._status.start()


def _with_state(event: Event) -> str:
    """Why a site does not take part, with its state before it unless the reason begins with that."""
    state, reason = str(event.get("state", "")), str(event["reason"])
    return reason if reason.startswith(state) else f"{state}: {reason}"


def _rows(joined: Collection[Event]) -> str:
    """How many rows sites have together, and what did not fit."""
    names = ("num_examples", "num_held_out", "num_truncated", "num_dropped")
    train, held_out, cut, dropped = (sum(event[name] or 0 for event in joined) for name in names)
    lost = f", {cut:,} cut, {dropped:,} dropped as too long or equal after the cut" if cut or dropped else ""
    return f"{train:,} rows to train, {held_out:,} held out{lost}"


def _named(sites: Collection[str]) -> str:
    """Sites by name; of many, their number."""
    return ", ".join(sites) if len(sites) <= MAX_NAMED else f"{len(sites)} sites"


def _figures(finished: Event) -> list[str]:
    """Gap, bytes and seconds of a round; blank for the base."""
    if not finished:
        return [f"{'-':>7}", f"{'-':>9}", f"{'-':>9}", f"{'-':>8}"]
    return [
        f"{percent(finished['gap']):>7}",
        f"{size(finished['bytes_down']):>9}",
        f"{size(finished['bytes_up']):>9}",
        f"{finished['seconds']:>6.1f} s",
    ]


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
