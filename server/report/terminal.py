"""A run in the terminal, drawn from its events: the plan, one line a round, and what went wrong."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from common import event_kinds
from common.data import overlap
from common.event_kinds import Event
from common.frame import site_states
from common.scores import Scores
from server.report.progress import Moving, Progress, duration
from server.view import export, figures, gate, polish
from server.view.figures import percent, size
from server.view.run_view import Row, RunView

MAX_NAMED: Final = 12  # sites of a run that are shown one by one; more are counted
INDENT: Final = 12  # columns of a line's head, under which the rest of a long one stands
NOTES_INDENT: Final = 8  # under the column `round`


@dataclass
class Screen:
    """Listens to events and prints; on a terminal moving lines say who is at work, and long lines are broken at words.

    Attributes:
        console: Where to print.
    """

    console: Console
    _view: RunView = field(default_factory=RunView)
    _told: set[str] = field(default_factory=set)  # sites that have a line or are counted in one
    _refused: dict[str, str] = field(default_factory=dict)
    _columns: list[str] = field(default_factory=list)
    _has_header: bool = False
    _num_large_gaps: int = 0
    _evaluation_down: int = 0

    def __post_init__(self) -> None:
        self._progress = Progress(self._view)
        self._moving = Moving(self.console, self._progress)

    def __call__(self, event: Event) -> None:
        """Take one event; kinds without a method of their own are not shown."""
        if not isinstance(event, event_kinds.SiteJoined | event_kinds.SiteRefused):
            self._show_joined()
        row = self._view.take(event)
        self._progress.take(event)
        if row and not isinstance(event, event_kinds.Evaluated):
            self._row(row, [])
        elif row and isinstance(event, event_kinds.Evaluated):
            self._row(row, self._notes(event))
            if self._view.plan and event.num_rounds == self._view.plan.num_rounds:
                self._evenness(event)
        if show := getattr(self, f"_on_{event.kind}", None):
            show(event)

    def _on_run_started(self, event: event_kinds.RunStarted) -> None:
        """The plan."""
        trained, base = event.num_trained_parameters, event.num_base_parameters
        self._print(f"[bold]{event.name}[/]  {event.num_rounds} rounds, {event.method}, run {event.run_sha256[:12]}")
        precision = _escape(figures.quantization(event))
        self._print(f"  base      {_escape(event.base)}, {base:,} parameters, {precision}")
        share = percent(trained / base)
        self._print(f"  adapter   {trained:,} parameters trained ({share}), {event.num_tensors} tensors")
        scored = event.bytes_evaluation_per_site
        more = f"evaluation {size(scored)} down" if scored else "what is evaluated is not sent again"
        down, up = size(event.bytes_down_per_site), size(event.bytes_up_per_site)
        self._print(f"  traffic   {down} down and {up} up, a site and round; {more}")
        if event.privacy == "none":
            self._print("  privacy   [yellow]none: updates leave the sites unprotected[/]")
        else:
            curve = event.epsilon_planned
            self._print(
                f"  privacy   epsilon {curve[-1]:.2f} at delta {event.dp_delta:g} after the last round, "
                f"{curve[0]:.2f} after the first; noise multiplier {event.noise_multiplier:.3f}"
            )
            self._print(f"            {event.privacy_wording}")
            if event.noise_ratio is not None:
                accepted = ", which was accepted" if event.noise_accepted else ""
                self._print(f"            noise to signal {event.noise_ratio:.2f}{accepted}")
        self._print(f"  bad sites {event.guarding}")

    def _on_overlap(self, event: event_kinds.Overlap) -> None:
        """Held-out rows whose text is trained on; shown again beside the last figures."""
        style = "[yellow]" if overlap.num_same(vars(event)) else ""
        self._print(f"  held out  {style}{overlap.sentence(vars(event))}{'[/]' if style else ''}")

    def _on_warned(self, event: event_kinds.Warned) -> None:
        """What to know before relying on the result."""
        self._print(f"  [yellow]warning[/]   {_escape(event.reason)}")

    def _on_tasks_overlap(self, event: event_kinds.TasksOverlap) -> None:
        """Tasks whose rows the sites train on."""
        for reason in event.reasons:
            self._print(f"  [yellow]warning[/]   {_escape(reason)}")

    def _on_site_joined(self, event: event_kinds.SiteJoined) -> None:
        """A site and its rows; of many sites, how many there are by now."""
        if len(self._view.joined) > MAX_NAMED:
            self._moving.show(f"joined: {len(self._view.joined)} sites")
        elif event.site not in self._told:
            self._told.add(event.site)
            self._print(f"  site      {_escape(event.site)}: {_num_rows([event])}, {event.num_steps} steps a round")

    def _show_joined(self) -> None:
        """All sites in one line, once they are there, if some came that have no line of their own."""
        joined = self._view.joined
        if joined.keys() > self._told:
            self._told = set(joined)
            self._print(f"  joined    {len(joined)} sites: {_num_rows(joined.values())}")

    def _on_site_refused(self, event: event_kinds.SiteRefused) -> None:
        """A node that does not take part."""
        if self._refused.get(event.site) == event.reason:  # it is asked before every round
            return
        self._refused[event.site] = event.reason
        colour = "yellow" if event.state in site_states.PENDING else "red"
        self._print(f"  [{colour}]site[/]      {_escape(event.site)}: {_escape(_with_state(event))}")

    def _on_round_started(self, event: event_kinds.RoundStarted) -> None:
        self._moving.show()

    def _on_evaluation_started(self, event: event_kinds.EvaluationStarted) -> None:
        self._moving.show()

    def _on_arm_started(self, event: event_kinds.ArmStarted) -> None:
        self._moving.show(f"arm {event.arm}")

    def _on_arm_step(self, event: event_kinds.ArmStep) -> None:
        self._moving.show(f"arm {event.arm}: round {event.round + 1}, step {event.step}/{event.num_steps}")

    def _on_compared(self, event: event_kinds.Compared) -> None:
        self._moving.stop()

    def _on_site_failed(self, event: event_kinds.SiteFailed) -> None:
        """An answer that does not count."""
        self._print(f"  [red]{_escape(event.site)}[/] {event.step}: {_escape(_with_state(event))}")

    def _on_site_skipped(self, event: event_kinds.SiteSkipped) -> None:
        """A site that fell silent and is not waited for."""
        self._print(f"  [yellow]{_escape(event.site)}[/] away: {_escape(event.reason)}")

    def _on_screened(self, event: event_kinds.Screened) -> None:
        """Updates that do not look like the others."""
        for site, seen in event.sites.items():
            if seen.reasons:
                outcome = "left out" if seen.is_left_out else "kept"
                self._print(f"  [red]{_escape(site)}[/] screening, {outcome}: {_escape('; '.join(seen.reasons))}")

    def _on_round_finished(self, event: event_kinds.RoundFinished) -> None:
        """Sites that claimed too much; the figures are shown with the held-out loss."""
        for site in event.held_to_share:
            self._print(f"  [yellow]{_escape(site)} claims more rows than its share of a round; held to that share[/]")

    def _row(self, row: Row, notes: list[str]) -> None:
        """One line of the table, and under it what has no column."""
        plan = self._view.plan
        if not self._has_header:
            self._header()
        cells = [f"{row.num_rounds:>6}", _cell(row.held_out_loss, width=8)]
        cells += [_cell(row.train_losses.get(site), width=_width(site)) for site in self._columns]
        if row.bytes_down is None or row.bytes_up is None or row.seconds is None:  # the base
            cells += [f"{'-':>7}", f"{'-':>8}", f"{'-':>8}", f"{'-':>8}"]
        else:
            time = f"{row.seconds:.1f} s" if row.seconds < 100 else duration(row.seconds)
            cells += [f"{percent(row.gap):>7}", f"{size(row.bytes_down):>8}", f"{size(row.bytes_up):>8}", f"{time:>8}"]
        if plan and plan.epsilon_planned:
            cells.append(f"{'-' if row.epsilon is None else format(row.epsilon, '.2f'):>7}")
        self.console.print(Text("  ".join(cells)), soft_wrap=True)
        under = [] if self._columns else [self._trained(row)]
        if plan and (row.gap or 0.0) > plan.gap_warning:
            self._num_large_gaps += 1
            under.append("[yellow]large gap[/]")
        if row.gap_error:
            under.append(f"gap ± {percent(row.gap_error)}")
        if row.gap_most:
            module, share, error = row.gap_most
            spread = f" ± {percent(error)}" if error else ""
            under.append(f"gap mostly in {_escape(module)}, {percent(share)}{spread}")
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
        text = each if NOTES_INDENT + len(f"train {each}") <= self.console.width else figures.in_brief(losses)
        return f"train {_escape(text)}" if text else ""

    def _on_not_evaluated(self, event: event_kinds.NotEvaluated) -> None:
        """No site has held-out figures to give, or none any more; the coordinator may have some of its own."""
        loss = "" if event.server_loss is None else f"; {event.server_loss:.3f} on the coordinator's own rows"
        after = event.stage or f"{event.num_rounds} rounds"
        self._print(f"  no figures after {_escape(after)}: {_escape(event.reason)}{loss}")

    def _evenness(self, event: Scores) -> None:
        """How the sites fare at the end."""
        view = self._view
        if even := figures.evenness(event):
            self._print(f"  sites     {_escape(even)}")
        for row in figures.precisions(view.base_noise, view.evaluated.get(0), view.last_evaluated):
            self._print(f"  precision {_escape(figures.precision_line(row))}")
        for site in event.outliers:
            loss = event.sites[site].loss
            self._print(f"  [yellow]{_escape(site)} tells a loss of {loss:.3g}, which is far from the other sites'[/]")
        if event.worse_than_base:
            self._print(f"  [yellow]worse than the base: {_escape(figures.worse(event))}[/]")
        if view.overlap:
            self._on_overlap(view.overlap)

    def _on_measured(self, event: event_kinds.Measured) -> None:
        """The coordinator's tasks at one stage, and how far they are from base and prompt-only."""
        self._print(f"  [bold]{event.stage}[/]")
        for line in figures.lines(event):
            self._print(f"    {_escape(line)}")

    def _on_derived(self, event: event_kinds.Derived) -> None:
        """Stages after the end of a run."""
        for line in polish.derived_in_words(event):
            self._print(f"  {_escape(line)}")

    def _on_polish_started(self, event: event_kinds.PolishStarted) -> None:
        """A stage and its rows."""
        rows = f"{event.num_rows:,} rows to train, {event.num_held_out:,} held out{polish.left_out(event)}"
        self._print(f"  polish    {event.number}/{event.num_stages} {event.stage} ({polish.kind(event)}): {rows}")
        self._moving.show(f"polish {event.stage}")

    def _on_polish_step(self, event: event_kinds.PolishStep) -> None:
        self._moving.show(f"polish {event.stage}: step {event.step}/{event.num_steps}")

    def _on_polish_finished(self, event: event_kinds.PolishFinished) -> None:
        """A stage's figures before and after."""
        self._moving.stop()
        self._print(f"            {polish.line(event)}, {event.num_steps} steps, {event.seconds:.1f} s")
        for line in polish.overlaps(event):
            self._print(f"            [yellow]{_escape(line)}[/]")

    def _on_polish_evaluated(self, event: event_kinds.PolishEvaluated) -> None:
        """What the sites say of a stage's adapter."""
        self._print(f"  sites     after {_escape(event.stage)}: held-out {event.loss:.3f}")
        self._under(self._notes(event))
        self._evenness(event)

    def _on_gated(self, event: event_kinds.Gated) -> None:
        """What the gate says of one adapter."""
        self._print(f"  [bold]gate, {event.stage}: {'passed' if event.is_passed else '[red]refused[/]'}[/]")
        for verdict in event.verdicts:
            self._print(f"    {_escape(gate.line(verdict))}")

    def _on_gated_later(self, event: event_kinds.GatedLater) -> None:
        """What rules that came after the end say."""
        for line in gate.later([event]):
            self._print(f"  {_escape(line)}")

    def _on_exported(self, event: event_kinds.Exported) -> None:
        """The sealed folder, and how near its formats are to the adapter."""
        for number, line in enumerate(export.summary(event)):
            self._print(f"  {'  ' if number else '[bold]export[/]   '} {_escape(line)}")

    def _on_stopped(self, event: event_kinds.Stopped) -> None:
        """The rounds end early."""
        self._print(f"[yellow]rounds end after {event.num_rounds}: {_escape(event.reason)}[/]")

    def _on_run_finished(self, event: event_kinds.RunFinished) -> None:
        """The end."""
        self._moving.stop()
        if self._num_large_gaps and (plan := self._view.plan):
            remedy = f"; aggregation.method = '{plan.without_gap}' has none" if plan.without_gap else ""
            self._print(
                f"[yellow]The gap passed {percent(plan.gap_warning)} in {self._num_large_gaps} of the rounds: "
                "the mean of the factors was that far from the mean of the updates. Fewer local steps a round bring it "
                f"down{remedy}.[/]"
            )

    def _on_run_failed(self, event: event_kinds.RunFailed) -> None:
        self._moving.stop()

    def _header(self) -> None:
        """Column names, once; each site has a column if all fit."""
        self._has_header = True
        names = [f"{'round':>6}", f"{'held-out':>8}"]
        others = [f"{'gap':>7}", f"{'down':>8}", f"{'up':>8}", f"{'time':>8}"]
        others += [f"{'epsilon':>7}"] if self._view.plan and self._view.plan.epsilon_planned else []
        joined = sorted(self._view.joined)
        sites = [f"{site:>{_width(site)}}" for site in joined]
        if len("  ".join([*names, *sites, *others])) <= self.console.width:
            self._columns, names = joined, [*names, *sites]
        self._print("")
        self.console.print(Text("  ".join([*names, *others]), style="bold"), soft_wrap=True)

    def _notes(self, event: Scores) -> list[str]:
        """What a reader should not miss of an evaluation, a line each."""
        notes = []
        if event.bytes_down and event.bytes_down != self._evaluation_down:  # as a rule every one has as many
            self._evaluation_down = event.bytes_down
            notes.append(f"evaluation {size(event.bytes_down)} down")
        if event.accuracy is not None:
            notes.append(f"agrees with {percent(event.accuracy)}, answers {event.answer_loss:.3f}")
        if event.server_loss is not None:
            notes.append(f"coordinator's rows {event.server_loss:.3f}")
        if self._view.overlap and (count := overlap.num_same(vars(self._view.overlap))):
            notes.append(f"[yellow]{count} held-out rows are trained on[/]")
        if event.worse_than_base:
            notes.append(f"[yellow]worse than the base: {len(event.worse_than_base)} sites[/]")
        if event.stale:
            notes.append(f"[yellow]stale: {_escape(', '.join(event.stale))}[/]")
        return notes

    def _print(self, markup: str) -> None:
        """A line; on a terminal that is too narrow for it, broken at words, with the rest under the first words."""
        text, breaks, column = Text.from_markup(markup), list[int](), 0
        for word in re.finditer(r"\S+\s*", text.plain) if self.console.is_terminal else ():
            if word.start() > INDENT and column + len(word[0].rstrip()) > self.console.width:
                breaks.append(word.start())
                column = INDENT
            column = max(column, word.start() if not breaks else column) + len(word[0])
        for number, line in enumerate(text.divide(breaks)):
            line.rstrip()
            self.console.print(Text(" " * INDENT if number else "") + line, soft_wrap=True, highlight=False)


def _with_state(event: event_kinds.SiteRefused | event_kinds.SiteFailed) -> str:
    """Why a site does not take part, with its state before it unless the reason begins with that."""
    return event.reason if event.reason.startswith(event.state) else f"{event.state}: {event.reason}"


def _num_rows(joined: Collection[event_kinds.SiteJoined]) -> str:
    """How many rows sites have together, and what did not fit."""
    train, held_out = (sum(getattr(event, name) for event in joined) for name in ("num_examples", "num_held_out"))
    cut, dropped = (sum(getattr(event, name) or 0 for event in joined) for name in ("num_truncated", "num_dropped"))
    lost = f", {cut:,} cut, {dropped:,} dropped as too long or equal after the cut" if cut or dropped else ""
    return f"{train:,} rows to train, {held_out:,} held out{lost}"


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
