"""A run's status, from its events alone."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from common import events
from server.folder import begun, lock, run_files
from server.report import report
from server.report import symptoms as troubleshooting
from server.report.terminal import MAX_NAMED
from server.view import export, figures, gate, polish
from server.view.figures import percent
from server.view.run_view import Row, RunView


def read(folder: Path) -> dict[str, Any]:
    """The status of a run folder, for programs; `docs/operations.md` lists the keys. Its report is drawn anew.

    Raises:
        DataError: Not a run folder.
    """
    path, is_live = folder / events.FILE, lock.is_live(folder)
    log, damaged = events.read_damaged(path)
    view = RunView.of(log)
    last, judged = view.at_sites, list(view.gated.values())
    told = last.as_dict() if last else {}
    symptoms = troubleshooting.symptoms(view)
    heads = {"sites": [figures.evenness(last)], "worse than base": [figures.worse(last)]} if last else {}
    for event in list(view.measured.values())[-1:]:
        heads[f"tasks, {event.stage}"] = list(figures.lines(event))
    heads |= {
        "of": polish.derived_in_words(view.derived),
        "later stages": polish.later(view),
        "gate": [*gate.summary(judged, view.stopped), *gate.later(view.gated_later)],
        "export": export.summary(view.exported),
        "What the numbers say": [f"{each.name}: {each.evidence}. {each.remedy}" for each in symptoms],
    }
    return {
        "status": report.status(view, is_live=is_live, go_on=begun.go_on(folder)),
        "is_live": is_live,
        "states": view.states,
        "damaged_events": damaged,
        "damage": events.in_words(path, damaged) if damaged else "",
        "finished_rounds": run_files.finished(folder),
        "finished_stages": [polish.line(event, shown) for event, shown in polish.stages(view)],
        **totals(view),
        "held_out_after": figures.stage_at_sites(last) if last else "",
        "exact_match": last.exact_match if last else None,
        "accuracy": last.accuracy if last else None,
        "sites": told.get("sites", {}),
        "stale": told.get("stale", []),
        "privacy": _privacy(view),
        "fairness": told.get("fairness"),
        "worse_than_base": told.get("worse_than_base", []),
        "measured": {stage: event.as_dict()["figures"] for stage, event in view.measured.items()},
        "gated": {event.stage: event.as_dict()["verdicts"] for event in judged},
        "symptoms": [vars(each) for each in symptoms],
        "in_words": {head: texts for head, texts in heads.items() if any(texts)},
        "report": str(report.write(folder)),
    }


def totals(view: RunView) -> dict[str, Any]:
    """What a run came to, in numbers; see `read`."""
    rows = [view.rows[number] for number in sorted(view.rows)]
    last = rows[-1] if rows else Row(0)
    newest = list(view.gated.values())[-1:]
    return {
        "run_sha256": view.plan.run_sha256 if view.plan else "",
        "num_rounds": last.num_rounds,
        "base_held_out_loss": view.rows[0].held_out_loss if 0 in view.rows else None,
        "held_out_loss": view.at_sites.loss if view.at_sites else None,
        "train_loss": last.train_loss,
        "gap": last.gap,
        "epsilon": last.epsilon,
        "dp_delta": view.plan.dp_delta if view.plan else None,
        "bytes_down": sum((row.bytes_down or 0) + (row.evaluation_bytes_down or 0) for row in rows),
        "bytes_up": sum((row.bytes_up or 0) + (row.evaluation_bytes_up or 0) for row in rows),
        "seconds": round(sum(row.seconds or 0.0 for row in rows), 3),
        "gate": {key: event.as_dict()[key] for event in newest for key in ("stage", "is_passed", "verdicts")} or None,
        "rounds": [dataclasses.asdict(row) for row in rows],
    }


def _privacy(view: RunView) -> dict[str, Any]:
    """What the rounds so far have cost a site as a whole; empty for another run."""
    spent = [event for event in view.rounds.values() if event.epsilon is not None]
    if not view.plan or not spent:
        return {}
    return {
        "epsilon": spent[-1].epsilon,
        "epsilon_insider": spent[-1].epsilon_insider,
        "dp_delta": view.plan.dp_delta,
        "wording": view.plan.privacy_wording,
    }


def render(result: dict[str, Any], *, all_sites: bool = False) -> Table:
    """The status as a table for a terminal.

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
    after = f" nats a token, exact match {exact}" if agreed is None else f", agrees with {percent(agreed)}"
    table.add_row("held-out", "-" if loss is None else f"{loss:.3f}{after}, after {result['held_out_after']}")
    if spent := result["privacy"]:
        insider = spent["epsilon_insider"]
        shown = "none worth the name" if insider is None else f"{insider:.3f}"
        table.add_row("privacy", f"epsilon {spent['epsilon']:.3f} so far, against an insider {shown}")
        table.add_row("", str(spent["wording"]))
    losses = {site: scored["loss"] for site, scored in result["sites"].items()}
    if len(losses) > MAX_NAMED and not all_sites:
        table.add_row(f"{len(losses)} sites", Text(f"{figures.in_brief(losses)}; --sites shows each"))
    else:
        for site, scored in result["sites"].items():
            stale = " (stale)" if site in result["stale"] else ""
            table.add_row(f"  {site}", f"{scored['loss']:.3f} over {scored['num_rows']} rows{stale}")
    for head, texts in result["in_words"].items():
        for number, text in enumerate(texts):
            table.add_row("" if number else head, Text(text))
    table.add_row("report", Text(str(result["report"])))
    return table
