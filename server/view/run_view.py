"""What the events of a run come to: the one place where a fact of a run is worked out. Views only format."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import events
from common.event_kinds import (
    BaseNoise,
    Compared,
    Derived,
    End,
    Evaluated,
    EvaluationStarted,
    Event,
    Exported,
    Gated,
    GatedLater,
    LaterFinished,
    LaterStarted,
    Measured,
    Overlap,
    PolishEvaluated,
    PolishFinished,
    PolishStarted,
    RoundFinished,
    RoundStarted,
    RunFailed,
    RunFinished,
    RunStarted,
    Screened,
    SiteEvaluated,
    SiteFailed,
    SiteJoined,
    SiteRefused,
    SiteSkipped,
    SiteStep,
    SiteTrained,
    Stopped,
    TasksOverlap,
)
from common.frame import site_states
from server.view import figures

TRAINING, EVALUATING = "training", "evaluating"


@dataclass(frozen=True)
class Row:
    """One round, or the base. None: not known, not disclosed, or not applicable.

    Attributes:
        num_rounds: Finished by then; 0 is the base.
        held_out_loss: Over all sites' held-out rows, nats per answer token; under preferences the loss that is learnt.
        exact_match: Share of generated answers equal to their reference.
        train_loss: Mean of the sites' training losses by their weights, likewise nats.
        train_losses: Of each site that trained; None where it does not disclose it.
        gap: Aggregation gap as a share of the step.
        gap_error: Standard error of the gap, where it is an estimate.
        gap_most: The module with the largest gap, that gap, and its standard error.
        epsilon: Of all rounds so far: what a unit was promised, or under noise for whole sites what was spent.
        bytes_down: To all sites for training.
        bytes_up: From them.
        evaluation_bytes_down: To all sites for the evaluation after the round.
        evaluation_bytes_up: From them.
        seconds: Of the round without its evaluation.
    """

    num_rounds: int
    held_out_loss: float | None = None
    exact_match: float | None = None
    train_loss: float | None = None
    train_losses: Mapping[str, float | None] = field(default_factory=dict)
    gap: float | None = None
    gap_error: float | None = None
    gap_most: tuple[str, float, float | None] | None = None
    epsilon: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    evaluation_bytes_down: int | None = None
    evaluation_bytes_up: int | None = None
    seconds: float | None = None


@dataclass
class RunView:
    """A run, as far as its events say; `take` follows them one by one.

    A run that was interrupted and resumed has several tries, each from a `RunStarted` on.

    Attributes:
        plan: Of the newest try.
        first: Of the first try.
        num_tries: How many there were.
        last: The newest event.
        exported_stage: Label of the adapter that the newest finished try exported; empty: none has finished.
        finished: The end of the newest try, if it ended well.
        failed: The newest failure of the newest try.
        end: The newer of the two.
        derived: Set where the folder is of stages after the end of a run.
        joined: The sites that took part, in any try.
        names: Of nodes, as their sites call themselves.
        rounds: By number from 0; of a round that was played again, the newest.
        trained: By round, the updates that count, by site.
        num_trainings: How often each site's update was taken, replayed rounds included.
        rows: The rounds as a table, by the number of finished rounds; 0 is the base.
        evaluated: By number of rounds, the newest.
        base_losses: Each site's first held-out loss with the base as it is.
        at_sites: What the sites said last, after a round or a stage.
        measured: By stage, in the order of their first; empty again once the base is measured anew.
        polish_started: Every start of a stage.
        polish_finished: By number of the stage.
        polish_evaluated: By number of the stage.
        stage: That began last in the newest try.
        judgements: All of the gate.
        gated: By stage, those of the newest try.
        gated_later: By rules that came after the end.
        screened: By round.
        problems: Answers of sites that did not count, nodes that do not take part or did not yet, and ends too early.
        later_started: Stages that were added after the end.
        later_finished: By the hash of their addendum.
        cohort: The sites that are asked now.
        done: Those of them that are through.
        steps: Where sites are within their training: step, and number of steps.
        round: The round that is played, from 0.
        doing: `TRAINING` or `EVALUATING`.
    """

    plan: RunStarted | None = None
    first: RunStarted | None = None
    num_tries: int = 0
    last: Event | None = None
    exported_stage: str = ""
    finished: RunFinished | None = None
    failed: RunFailed | None = None
    end: End | None = None
    derived: Derived | None = None
    joined: dict[str, SiteJoined] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    rounds: dict[int, RoundFinished] = field(default_factory=dict)
    trained: dict[int, dict[str, SiteTrained]] = field(default_factory=dict)
    num_trainings: dict[str, int] = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)
    evaluated: dict[int, Evaluated] = field(default_factory=dict)
    last_evaluated: Evaluated | None = None
    base_losses: dict[str, float] = field(default_factory=dict)
    at_sites: Evaluated | PolishEvaluated | None = None
    measured: dict[str, Measured] = field(default_factory=dict)
    polish_started: list[PolishStarted] = field(default_factory=list)
    polish_finished: dict[int, PolishFinished] = field(default_factory=dict)
    polish_evaluated: dict[int, PolishEvaluated] = field(default_factory=dict)
    stage: PolishStarted | None = None
    judgements: list[Gated] = field(default_factory=list)
    gated: dict[str, Gated] = field(default_factory=dict)
    gated_later: list[GatedLater] = field(default_factory=list)
    stopped: Stopped | None = None
    exported: Exported | None = None
    compared: Compared | None = None
    overlap: Overlap | None = None
    tasks_overlap: TasksOverlap | None = None
    base_noise: BaseNoise | None = None
    screened: dict[int, Screened] = field(default_factory=dict)
    problems: list[SiteFailed | SiteRefused | RunFailed] = field(default_factory=list)
    later_started: list[LaterStarted] = field(default_factory=list)
    later_finished: dict[str, LaterFinished] = field(default_factory=dict)
    cohort: Sequence[str] = ()
    done: list[str] = field(default_factory=list)
    steps: dict[str, tuple[int, int]] = field(default_factory=dict)
    round: int = 0
    doing: str = ""
    _states: dict[str, str] = field(default_factory=dict)  # of sites, in the newest try
    _refused_as: dict[int, str] = field(default_factory=dict)  # nodes whose site was not known yet
    _pending: Row | None = None  # a round whose evaluation may still come

    @classmethod
    def of(cls, log: Iterable[Event]) -> "RunView":
        """The view of these events."""
        view = cls()
        for event in log:
            view.take(event)
        return view

    @classmethod
    def read(cls, path: Path) -> "RunView":
        """The view of a log; an empty one where there is none yet.

        Raises:
            DataError: A line is not an event.
        """
        return cls.of(events.read(path) if path.is_file() else ())

    @property
    def num_released(self) -> int:
        """The rounds from the first on that have been played, whether or not their checkpoints are still there."""
        return max(self.rounds, default=-1) + 1

    @property
    def states(self) -> dict[str, list[str]]:
        """How each site stood last in the newest try: state to sites, both in the order of their names."""
        found = self._states
        return {state: sorted(site for site in found if found[site] == state) for state in sorted({*found.values()})}

    @property
    def troubles(self) -> list[tuple[str, str]]:
        """Sites and what went wrong there: failed answers, refusals, and what screening saw.

        A site that took part in the end was no trouble while it waited.
        """
        found = [(event.site, event.reason) for event in self.problems if isinstance(event, SiteFailed)]
        for event in self.problems:
            if isinstance(event, SiteRefused) and not (event.state in site_states.PENDING and event.node in self.names):
                found.append((self.names.get(event.node, event.site), event.reason))
        for number, screened in self.screened.items():
            for site, seen in screened.sites.items():
                if seen.reasons:
                    outcome = "left out" if seen.is_left_out else "kept"
                    found.append((site, f"screening, round {number + 1}, {outcome}: {'; '.join(seen.reasons)}"))
        return found

    def trained_sites(self, num_rounds: int) -> dict[str, int]:
        """Training rows of every site whose update is in the adapter after so many rounds, by name."""
        found: dict[str, int] = {}
        for number in sorted(number for number in self.trained if number < num_rounds):
            found |= {site: event.num_examples for site, event in self.trained[number].items()}
        return dict(sorted(found.items()))

    def take(self, event: Event) -> Row | None:  # long as it has a case for each kind
        """Follow one event; kinds that change nothing here are passed over.

        Returns:
            The row of the table that is whole with this event: with its evaluation, or as the next round begins
            without one.
        """
        whole: Row | None = None
        self.last = event
        if isinstance(event, RunStarted | RoundStarted | RunFinished):
            whole, self._pending = self._pending, None
        if isinstance(event, SiteFailed | SiteRefused | RunFailed):
            self.problems.append(event)
        match event:
            case RunStarted():
                self.plan, self.first, self.num_tries = event, self.first or event, self.num_tries + 1
                self.finished = self.failed = self.end = self.stage = None
                self.gated, self._states = {}, {}
                self.round, self.cohort, self.done, self.steps = event.first_round, (), [], {}
            case Derived():
                self.derived, self.end = event, None
            case SiteJoined():
                self._states.pop(self._refused_as.pop(event.node, ""), None)
                self.names[event.node], self.joined[event.site] = event.site, event
                self._states[event.site] = site_states.APPROVED
            case SiteRefused():
                site = self.names.get(event.node, event.site)
                self._refused_as[event.node], self._states[site] = site, event.state
            case SiteSkipped():
                self._states[event.site] = site_states.AWAY
            case SiteFailed():
                self._states[event.site] = event.state
                self._through(event.site)
            case RoundStarted():
                self.trained[event.round] = {}
                self._states |= dict.fromkeys(event.sites, site_states.TRAINING)
                self.round, self.doing = event.round, TRAINING
                self.cohort, self.done, self.steps = event.sites, [], {}
            case SiteStep():
                self.steps = {event.site: (event.step, event.num_steps)}
            case SiteTrained():
                self.trained.setdefault(event.round, {})[event.site] = event
                self.num_trainings[event.site] = self.num_trainings.get(event.site, 0) + 1
                self._states[event.site] = site_states.TRAINING
                self._through(event.site)
            case Screened():
                self.screened[event.round] = event
            case RoundFinished():
                self.rounds[event.round] = event
                self._pending = self.rows[event.round + 1] = self._row(event)
                self.round, self.doing, self.cohort, self.done = event.round + 1, EVALUATING, (), []
            case EvaluationStarted():
                self.doing, self.cohort, self.done, self.steps = EVALUATING, event.sites, [], {}
            case SiteEvaluated():
                self._through(event.site)
            case Evaluated():
                whole = self._evaluated(event)
            case Measured():
                self.measured = {} if event.stage == figures.BASE else self.measured
                self.measured[event.stage] = event
            case PolishStarted():
                self.polish_started.append(event)
                self.stage = event
            case PolishFinished():
                self.polish_finished[event.number] = event
            case PolishEvaluated():
                self.polish_evaluated[event.number] = self.at_sites = event
            case Stopped():
                self.stopped = event
            case Gated():
                self.judgements.append(event)
                self.gated[event.stage] = event
            case GatedLater():
                self.gated_later.append(event)
            case Exported():
                self.exported = event
            case Compared():
                self.compared = event
            case Overlap():
                self.overlap = event
            case TasksOverlap():
                self.tasks_overlap = event
            case BaseNoise():
                self.base_noise = event
            case LaterStarted():
                self.later_started.append(event)
            case LaterFinished():
                self.later_finished[event.addendum_sha256] = event
            case RunFinished():
                self.finished = self.end = event
                self.exported_stage = event.stage
                part = (site_states.APPROVED, site_states.TRAINING)
                self._states = {
                    site: site_states.FINISHED if state in part else state for site, state in self._states.items()
                }
            case RunFailed():
                self.failed = self.end = event
        return whole

    def _through(self, site: str) -> None:
        """A site has answered what it was asked."""
        self.done += [site] if site in self.cohort else []
        self.steps.pop(site, None)

    def _row(self, event: RoundFinished) -> Row:
        """A round's own figures."""
        planned = self.plan.epsilon_planned if self.plan else ()
        promised = planned[event.round] if event.round < len(planned) else None
        module = max(event.gap_modules, key=event.gap_modules.__getitem__, default="")
        most = None
        if module and event.gap_modules[module] > 0:
            most = (short(module), event.gap_modules[module], event.gap_module_errors.get(module, 0.0))
        return Row(
            event.round + 1,
            train_loss=event.train_loss,
            train_losses={site: told.train_loss for site, told in self.trained.get(event.round, {}).items()},
            gap=event.gap,
            gap_error=event.gap_error,
            gap_most=most,
            epsilon=promised if event.epsilon is None else event.epsilon,
            bytes_down=event.bytes_down,
            bytes_up=event.bytes_up,
            seconds=event.seconds,
        )

    def _evaluated(self, event: Evaluated) -> Row:
        """What the sites scored after a round, and the row that it makes whole."""
        number = event.num_rounds
        self.evaluated[number] = self.last_evaluated = self.at_sites = event
        if number == 0:
            for site, told in event.sites.items():
                self.base_losses.setdefault(site, told.loss)
        is_after = self._pending is not None and self._pending.num_rounds == number
        row = self._pending if self._pending and is_after else Row(number)
        self._pending, before = None, self.rows.get(number)
        scored = dataclasses.replace(row, held_out_loss=event.loss, exact_match=event.exact_match)
        scored = dataclasses.replace(scored, evaluation_bytes_down=event.bytes_down, evaluation_bytes_up=event.bytes_up)
        self.rows[number] = scored
        if before and before.bytes_down is not None and not is_after:  # a resumed run only scores it again
            self.rows[number] = dataclasses.replace(before, held_out_loss=event.loss, exact_match=event.exact_match)
        return scored


def short(module: str) -> str:
    """A module's name without what all names begin with.

    Example:
        >>> short("base_model.model.model.layers.0.mlp.up_proj")
        'layers.0.mlp.up_proj'
    """
    return module.removeprefix("base_model.model.").removeprefix("model.")
