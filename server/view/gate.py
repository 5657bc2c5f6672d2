"""Verdicts of the gate for people: what terminal, status, report and model card show of the same events."""

from collections.abc import Iterable, Sequence

from common.event_kinds import Gated, GatedLater, Stopped
from common.scores import Verdict
from server.view import figures


def line(verdict: Verdict) -> str:
    """One verdict: the rule, the figure, and by how much it holds or not.

    Example:
        >>> line(Verdict("pii", False, 0.5, 0.0, -0.5, "a.emission"))
        'pii not met by 0.500: 0.500, limit 0.000 (a.emission)'
    """
    if verdict.margin is None or verdict.value is None or verdict.limit is None:
        return f"{verdict.name} not met: {verdict.reason}"
    outcome = "met" if verdict.is_met else "not met"
    value, limit, margin = (_number(each) for each in (verdict.value, verdict.limit, verdict.margin))
    return f"{verdict.name} {outcome} by {margin.lstrip('-')}: {value}, limit {limit} ({verdict.reason})"


def summary(judged: Sequence[Gated], stopped: Stopped | None = None) -> list[str]:
    """Each adapter that the gate judged with its verdicts, an early end, and how far back it went.

    Args:
        judged: The newest of each stage, in the order of their first.
        stopped: The early end of the rounds, if there was one.
    """
    text = _early_end(stopped)
    for event in judged:
        text.append(f"{event.stage}: {'passed' if event.is_passed else 'refused'}")
        text += [f"  {line(verdict)}" for verdict in event.verdicts]
    passed = [event.stage for event in judged if event.is_passed]
    if judged and not passed:
        text.append("no checkpoint passes; nothing is exported")
    elif judged and not judged[0].is_passed:
        text.append(f"rolled back: {passed[-1]} is what is exported")
    return text


def later(judged: Iterable[GatedLater]) -> list[str]:
    """What rules that came after the end of a run say, in lines; of the same rules and adapter the last."""
    text = []
    for event in {(event.adapter_sha256, event.definition_sha256): event for event in judged}.values():
        outcome = "passed" if event.is_passed else "refused"
        text.append(f"{event.stage}: {outcome} by rules given after the end, {event.definition_sha256[:12]}")
        text += [f"  {line(verdict)}" for verdict in event.verdicts]
    return text


def of_export(judged: Sequence[Gated], stopped: Stopped | None, *, stage: str) -> list[str]:
    """What the gate said of an adapter, and which it refused before; empty: no gate."""
    stages = [event.stage for event in judged]
    if stage not in stages:
        return []
    place = stages.index(stage)
    text = [line(verdict) for verdict in judged[place].verdicts]
    if refused := [event.stage for event in judged[:place] if not event.is_passed]:
        text.append(f"refused before it: {', '.join(refused)}")
    return text + _early_end(stopped)


def _early_end(stopped: Stopped | None) -> list[str]:
    """A line on an early end of the rounds."""
    return [f"rounds ended early: {stopped.reason}"] if stopped else []


def _number(value: float) -> str:
    """A figure; small ones with more digits, so that a breach never reads as 0.

    Example:
        >>> _number(0.0004), _number(0.25)
        ('0.0004', '0.250')
    """
    return f"{value:.2g}" if 0 < abs(value) < 0.001 else figures.number(value)
