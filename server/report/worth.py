"""Whether a run was worth it, in one sentence: from its gate, from intervals, and from what was compared.

Nothing is called better because it is larger: a figure speaks where its interval of 95 % does not hold 0. What no
interval tells is said to be open, and a run of which nothing else can be said is undecided.
"""

from dataclasses import dataclass, field
from typing import Final, Literal

from common.errors import GateRefused
from common.event_kinds import RunFailed
from common.scores import Scores
from server.evaluate.figures import intervals
from server.evaluate.figures.intervals import Estimate
from server.view import figures, polish
from server.view.figures import signed_percent
from server.view.run_view import RunView

MIN_ROWS: Final = 30  # of fewer, the bootstrap's interval is too narrow
MAX_NAMED: Final = 4  # figures of tasks that are named; more are counted
GUARDING: Final = ("probe", "memorisation", "pii")  # kinds of tasks that guard what was there; no gain is a use
Answer = Literal["yes", "no", "partly", "undecided"]


@dataclass
class Evidence:
    """What speaks for an adapter, against it, and for neither; and whether an interval stands behind the first."""

    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    is_shown: bool = False


@dataclass(frozen=True)
class Worth:
    """The verdict.

    Attributes:
        answer: In a word.
        sentence: With the figures behind it.
    """

    answer: Answer
    sentence: str


def verdict(view: RunView) -> Worth:
    """Say whether the adapter that a run exports is better than its base, and than what each site had alone."""
    if view.end is None:
        return Worth("undecided", "Undecided: the run has not come to its end.")
    if isinstance(view.end, RunFailed):
        is_refused = view.end.error == GateRefused.__name__
        why = "the gate refuses all that was trained" if is_refused else "the run failed before its end"
        return Worth("no" if is_refused else "undecided", f"{'No' if is_refused else 'Undecided'}: {why}.")
    evidence, stage = Evidence(), view.end.stage
    _sites(evidence, view, stage, num_rounds=view.end.num_rounds)
    _tasks(evidence, view, stage)
    _arms(evidence, view)
    passed = ["the gate passed"] if stage in view.gated and view.gated[stage].is_passed else []
    # what speaks against stands first; that a figure is below another one decides nothing without an interval beside it
    parts = [*evidence.bad, *evidence.good, *passed, *(f"unclear: {each}" for each in evidence.open)]
    answers: tuple[Answer, Answer] = ("no", "partly") if evidence.bad else ("undecided", "yes")
    answer = answers[evidence.is_shown]
    return Worth(answer, f"{answer.capitalize()}: {'; '.join(parts)}.")


def change_at_sites(before: Scores, after: Scores) -> Estimate | None:
    """How far held-out loss moved, as a share of the base's, at the mean site, with Student's interval over sites.

    Each site counts the same. None for fewer than two sites that have both.
    """
    sites = [site for site in after.sites if site in before.sites and site not in after.stale]
    pairs = [(before.sites[site].loss, after.sites[site].loss) for site in sites]
    shares = [late / early - 1 for early, late in pairs if early > 0]
    return intervals.mean_of_few(shares) if len(shares) > 1 else None


def _sites(evidence: Evidence, view: RunView, stage: str, *, num_rounds: int) -> None:
    """The sites' held-out loss against the base's."""
    before = view.evaluated.get(0)
    after: Scores | None = view.evaluated.get(num_rounds)
    is_before_polish = False
    if stage.startswith(polish.LABEL):
        scored = {polish.label(event.number, event.stage): event for event in view.polish_evaluated.values()}
        after, is_before_polish = scored.get(stage, after), stage not in scored
    if before is None or after is None or after is before:
        evidence.open.append("the sites' loss, as they did not score both the base and this adapter")
        return
    change = change_at_sites(before, after)
    if change is None:
        share = after.loss / before.loss - 1 if before.loss else 0.0
        evidence.open.append(f"held-out loss {_moved(share)}, and one site gives no interval")
        return
    what = (
        f"held-out loss {_moved(change.value)} at the mean site (95 % interval {signed_percent(change.low)} to "
        f"{signed_percent(change.high)}, over {len(after.sites)} sites)"
    )
    if is_before_polish:
        evidence.open.append(f"what polish did to the sites' loss, as they did not score it; before it {what}")
        return
    side = evidence.open if change.low <= 0 <= change.high else evidence.good if change.high < 0 else evidence.bad
    side.append(what)
    evidence.is_shown |= side is evidence.good
    if after.worse_than_base:
        evidence.bad.append(f"worse than the base at {figures.worse(after)} nats")


def _tasks(evidence: Evidence, view: RunView, stage: str) -> None:
    """The coordinator's tasks against the base, by the paired bootstrap."""
    measured = view.measured.get(stage)
    named: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    gains = measured.gains.get(figures.BASE, {}) if measured else {}
    for name, figure in measured.figures.items() if measured else ():
        if name not in gains:
            continue
        gain = gains[name]
        if figure.num_rows < MIN_ROWS:
            evidence.open.append(f"{name} {figures.rise(gain)}, of {figure.num_rows} rows")
            continue
        outcome = figures.verdict(figure, gain)
        if outcome != "better" or figure.kind not in GUARDING:
            named[outcome].append(f"{name} {figures.rise(gain)}")
    evidence.is_shown |= bool(named["better"])
    for outcome, side in (("better", evidence.good), ("worse", evidence.bad), ("unclear", evidence.open)):
        if names := named[outcome]:
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            side.append(f"{'' if side is evidence.open else f'{outcome}: '}{', '.join(names[:MAX_NAMED])}{more}")


def _arms(evidence: Evidence, view: RunView) -> None:
    """What each site had alone, where it was compared."""
    arms = view.compared.comparison if view.compared else {}
    alone = {name: arm.held_out_loss for name, arm in arms.items() if name.startswith("site-")}
    if "federated" not in arms or not alone:
        return
    loss = arms["federated"].held_out_loss
    if better := [f"{name} {other:.3f}" for name, other in alone.items() if other <= loss]:
        evidence.bad.append(f"not better than what a site trained alone: {loss:.3f} against {', '.join(better)}")
    else:
        evidence.good.append(f"better than every site alone ({loss:.3f} against {min(alone.values()):.3f} at best)")


def _moved(share: float) -> str:
    """A change of a loss in words.

    Example:
        >>> _moved(-0.12)
        'fell 12.0 %'
    """
    return f"{'fell' if share < 0 else 'rose'} {100 * abs(share):.1f} %"
