"""How a run stands, from its events alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from common import events
from common.event_kinds import Event
from server.folder import begun, lock, run_files
from server.report import report
from server.report import symptoms as troubleshooting
from server.report.terminal import MAX_NAMED, percent
from server.view import export, gate, round_rows
from server.view import figures as view
from server.view import polish as told_of_polish


def read(folder: Path) -> dict[str, Any]:
    """The state of a run folder; its report is drawn anew.

    Raises:
        DataError: Not a run folder.
    """
    path, is_live = folder / events.FILE, lock.is_live(folder)
    log, damaged = events.read_damaged(path)
    last: Mapping[str, Any] = view.last_at_sites(log) or {}
    return {
        "status": report.status(log, is_live=is_live, go_on=begun.go_on(folder)),
        "is_live": is_live,
        "states": report.states(log),
        "damaged_events": damaged,
        "damage": events.in_words(path, damaged) if damaged else "",
        "finished_rounds": run_files.finished(folder),
        "finished_stages": [told_of_polish.line(stage) for stage in told_of_polish.stages(log)],
        **round_rows.as_dict(log),
        "held_out_after": view.stage_at_sites(last) if last else "",
        "exact_match": last.get("exact_match"),
        "accuracy": last.get("accuracy"),
        "sites": last.get("sites", {}),
        "stale": last.get("stale", []),
        "privacy": _privacy(log),
        "fairness": last.get("fairness"),
        "worse_than_base": last.get("worse_than_base", []),
        "measured": {stage: event["figures"] for stage, event in view.stages(log).items()},
        "gated": {event["stage"]: event["verdicts"] for event in gate.of_log(log)},
        "symptoms": [vars(one) for one in troubleshooting.symptoms(log)],
        "in_words": _in_words(log, last),
        "report": str(report.write(folder)),
    }


def _privacy(log: list[Event]) -> dict[str, Any]:
    """What the rounds so far have cost a site as a whole; empty for another run."""
    plans = [event for event in log if event["kind"] == "run_started"]
    done = [event for event in log if event["kind"] == "round_finished" and "epsilon" in event]
    if not plans or not done:
        return {}
    told = {name: done[-1][name] for name in ("epsilon", "epsilon_insider")}
    return {**told, "dp_delta": plans[-1]["dp_delta"], "wording": plans[-1]["privacy_wording"]}


def _in_words(log: list[Event], last: Mapping[str, Any]) -> dict[str, list[str]]:
    """Lines for people, by their head."""
    measured = list(view.stages(log).values())[-1:]
    told = {"sites": [view.evenness(last)], "worse than base": [view.worse(last)]} if last else {}
    told |= {f"tasks, {event['stage']}": list(view.lines(event)) for event in measured}
    symptoms = [f"{one.name}: {one.evidence}. {one.remedy}" for one in troubleshooting.symptoms(log)]
    derived, later = told_of_polish.derived(log), told_of_polish.later(log)
    told |= {"of": told_of_polish.derived_in_words(derived) if derived else [], "later stages": later}
    told |= {
        "gate": [*gate.summary(log), *gate.later(log)],
        "export": export.summary(log),
        "What the numbers say": symptoms,
    }
    return {head: texts for head, texts in told.items() if any(texts)}


def render(result: dict[str, Any], *, all_sites: bool = False) -> Table:
    """For people.

    Args:
        result: From `read`.
        all_sites: Show every site; else only so many as `MAX_NAMED`, and of more the best and the worst.
    """
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    done = result["finished_rounds"]
    loss = result["held_out_loss"]
    table.add_row("status", Text(str(result["status"])))
    if result["damage"]:
        table.add_row("damaged", Text(result["damage"]))
    for state, names in result["states"].items():
        table.add_row("sites", Text(f"{state}: {', '.join(names) if len(names) <= MAX_NAMED else len(names)}"))
    table.add_row("checkpoints", f"{len(done)}, newest after round {done[-1]}" if done else "none")
    for stage in result["finished_stages"]:
        table.add_row("polish", stage)
    exact, agreed = percent(result["exact_match"]), result["accuracy"]
    told_loss = f" nats a token, exact match {exact}" if agreed is None else f", agrees with {percent(agreed)}"
    table.add_row("held-out", "-" if loss is None else f"{loss:.3f}{told_loss}, after {result['held_out_after']}")
    if spent := result["privacy"]:
        insider = spent["epsilon_insider"]
        shown = "none worth the name" if insider is None else f"{insider:.3f}"
        table.add_row("privacy", f"epsilon {spent['epsilon']:.3f} so far, against an insider {shown}")
        table.add_row("", str(spent["wording"]))
    losses = {site: figures["loss"] for site, figures in result["sites"].items()}
    if len(losses) > MAX_NAMED and not all_sites:
        table.add_row(f"{len(losses)} sites", Text(f"{round_rows.in_brief(losses)}; --sites shows each"))
    else:
        for site, figures in result["sites"].items():
            stale = " (stale)" if site in result["stale"] else ""
            table.add_row(f"  {site}", f"{figures['loss']:.3f} over {figures['num_rows']} rows{stale}")
    for head, texts in result["in_words"].items():
        for place, text in enumerate(texts):
            table.add_row("" if place else head, Text(text))
    table.add_row("report", Text(str(result["report"])))
    return table
