"""How a run stands, from its events alone."""

from pathlib import Path
from typing import Any

from rich.table import Table

from common import events
from server import checkpoint, report
from server.show import percent


def read(folder: Path) -> dict[str, Any]:
    """The state of a run folder; its report is drawn anew.

    Raises:
        DataError: Not a run folder.
    """
    log = events.read(folder / "events.jsonl")
    evaluated = [event for event in log if event["kind"] == "evaluated"]
    last = evaluated[-1] if evaluated else {}
    return {
        "status": report.status(log),
        "finished_rounds": checkpoint.finished(folder),
        "held_out_loss": last.get("loss"),
        "exact_match": last.get("exact_match"),
        "accuracy": last.get("accuracy"),
        "sites": last.get("sites", {}),
        "stale": last.get("stale", []),
        "report": str(report.write(folder)),
    }


def render(result: dict[str, Any]) -> Table:
    """For people."""
    table = Table(box=None, show_header=False, pad_edge=False)
    done = result["finished_rounds"]
    loss = result["held_out_loss"]
    table.add_row("status", str(result["status"]))
    table.add_row("checkpoints", f"{len(done)}, newest after round {done[-1]}" if done else "none")
    exact, agreed = percent(result["exact_match"]), result["accuracy"]
    told = f" nats a token, exact match {exact}" if agreed is None else f", agrees with {percent(agreed)}"
    table.add_row("held-out", "-" if loss is None else f"{loss:.3f}{told}")
    for site, figures in result["sites"].items():
        stale = " (stale)" if site in result["stale"] else ""
        table.add_row(f"  {site}", f"{figures['loss']:.3f} over {figures['num_rows']} rows{stale}")
    table.add_row("report", str(result["report"]))
    return table
