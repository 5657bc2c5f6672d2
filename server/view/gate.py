"""Verdicts for people: what terminal, status, report and model card show of the same events."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.event_kinds import Event
from server.view import figures


def line(verdict: Mapping[str, Any]) -> str:
    """One verdict: the rule, what was found, and by how much it holds or not.

    Example:
        >>> line({"name": "pii", "is_met": False, "value": 0.5, "limit": 0.0, "margin": -0.5, "reason": "a.emission"})
        'pii not met by 0.500: 0.500, limit 0.000 (a.emission)'
    """
    if verdict["margin"] is None:
        return f"{verdict['name']} not met: {verdict['reason']}"
    how = "met" if verdict["is_met"] else "not met"
    value, limit, margin = (_number(verdict[key]) for key in ("value", "limit", "margin"))
    return f"{verdict['name']} {how} by {margin.lstrip('-')}: {value}, limit {limit} ({verdict['reason']})"


def of_log(log: Sequence[Event]) -> list[Event]:
    """The last event `gated` of each stage, in the order of the first; of a run begun anew only the newest."""
    starts = [index for index, event in enumerate(log) if event["kind"] == "run_started"]
    latest = log[starts[-1] :] if starts else log
    return list({event["stage"]: event for event in latest if event["kind"] == "gated"}.values())


def summary(log: Sequence[Event]) -> list[str]:
    """The gate in lines: each adapter that it judged with its verdicts, an early end, and how far back it went."""
    told = [f"rounds ended early: {event['reason']}" for event in log if event["kind"] == "stopped"][-1:]
    judged = of_log(log)
    for event in judged:
        told.append(f"{event['stage']}: {'passed' if event['is_passed'] else 'refused'}")
        told += [f"  {line(verdict)}" for verdict in event["verdicts"]]
    if judged and not any(event["is_passed"] for event in judged):
        told.append("no checkpoint passes; nothing is exported")
    elif judged and not judged[0]["is_passed"]:
        passed = [event["stage"] for event in judged if event["is_passed"]]
        told.append(f"rolled back: {passed[-1]} is what is exported")
    return told


def later(log: Sequence[Event]) -> list[str]:
    """What rules that came after the end of a run say, in lines; of the same rules and adapter the last."""
    found = {(e["adapter_sha256"], e["definition_sha256"]): e for e in log if e["kind"] == "gated_later"}
    told = []
    for event in found.values():
        how = "passed" if event["is_passed"] else "refused"
        told.append(f"{event['stage']}: {how} by rules given after the end, {event['definition_sha256'][:12]}")
        told += [f"  {line(verdict)}" for verdict in event["verdicts"]]
    return told


def of_export(log: Sequence[Event], *, stage: str) -> list[str]:
    """What the gate said of an adapter, and which it refused before; empty: no gate."""
    judged = of_log(log)
    places = [place for place, event in enumerate(judged) if event["stage"] == stage]
    if not places:
        return []
    told = [line(verdict) for verdict in judged[places[-1]]["verdicts"]]
    refused = [event["stage"] for event in judged[: places[-1]] if not event["is_passed"]]
    told += [f"refused before it: {', '.join(refused)}"] if refused else []
    return told + [f"rounds ended early: {event['reason']}" for event in log if event["kind"] == "stopped"][-1:]


def _number(value: float) -> str:
    """A figure; small ones with more digits, so that a breach never reads as 0.

    Example:
        >>> _number(0.0004), _number(0.25)
        ('0.0004', '0.250')
    """
    return f"{value:.2g}" if 0 < abs(value) < 0.001 else figures.number(value)
