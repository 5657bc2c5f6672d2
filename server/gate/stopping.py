"""Early end of the rounds, decided from the run's events alone, so that a resumed run decides the same.

An evaluation is bad if it breaks a rule that more training does not mend (`rules.HARMS`: probes, sites, exposure,
extraction, pii), or if the sites' held-out loss, without the best and the worst sites', is no lower than the lowest so
far, the base's included. So many bad ones in a row end the rounds. Rules that a run has yet to reach, such as beating a
baseline, end none.
"""

from common import events
from common.event_kinds import Stopped
from common.events import EventLog
from common.run import config
from server.evaluate import measure
from server.gate import figures, rules
from server.view import fairness, gate
from server.view.run_view import RunView


def ends(run: config.RunConfig, log: EventLog, *, num_rounds: int) -> bool:
    """Whether the rounds end after so many; the event `stopped` says why."""
    if not run.gate.stop_after or not num_rounds:
        return False
    past = events.read(log.path)
    bad = bad_in_a_row(run, RunView.of(past), num_rounds=num_rounds)
    if len(bad) < run.gate.stop_after:
        return False
    if not any(isinstance(event, Stopped) and event.num_rounds == num_rounds for event in past):
        reason = f"{len(bad)} evaluations in a row were bad, gate.stop_after is {run.gate.stop_after}; {bad[-1]}"
        log.append(Stopped(num_rounds=num_rounds, reason=reason))
    return True


def bad_in_a_row(run: config.RunConfig, view: RunView, *, num_rounds: int) -> list[str]:
    """What is wrong with each of the newest evaluations, back to the last good one.

    Only those after every `evaluation.every_rounds` rounds count: a run that is resumed has more.
    """
    every = run.evaluation.every_rounds
    losses = {number: fairness.decisive(event) for number, event in view.evaluated.items()}
    bad: list[str] = []
    lowest = losses.get(0)
    for number in sorted(number for number in losses if 0 < number <= num_rounds and number % every == 0):
        wrong = _harm(run, view, num_rounds=number)
        if lowest is not None and not losses[number] < lowest:
            wrong.append(f"held-out loss {losses[number]:.4f} after {number} rounds, lowest {lowest:.4f}")
        lowest = losses[number] if lowest is None else min(lowest, losses[number])
        bad = [*bad, "; ".join(wrong)] if wrong else []
    return bad


def _harm(run: config.RunConfig, view: RunView, *, num_rounds: int) -> list[str]:
    """Rules of harm that the figures break; what was not measured then breaks none."""
    harms = [rule for rule in run.gate.rules if rule.kind in rules.HARMS]
    if not harms:
        return []
    stage = measure.stage_of(num_rounds, last=run.federation.num_rounds)
    known = figures.gather(run, view, stage=stage, num_rounds=num_rounds)
    verdicts = [rules.RULES[rule.kind](rule, run.gate, known) for rule in harms]
    return [gate.line(verdict) for verdict in verdicts if verdict.margin is not None and not verdict.is_met]
