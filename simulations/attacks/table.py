"""Every way to aggregate against every attack, one run each."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import median
from typing import Any, Final

from rich.table import Table

from common import events
from common.event_kinds import SiteTrained
from common.run import config
from common.run.rules.rules import MIN_SCREENED
from server.folder import run_files
from simulations.attacks import run
from simulations.world.world import World

GUARDS: Final = ("none", "screening", "norm bound", "median", "trimmed_mean", "krum", "multi_krum", "bulyan")
TITLES: Final = {"held_out_loss": "held-out loss of honest sites", "trigger_loss": "loss of the attacker's answer"}


def play(shared: World, *, num_bad: int) -> dict[str, Any]:
    """All runs, the control without any guard first: the bound on norms comes from it.

    Args:
        num_bad: Bad sites, and how many each rule is given.

    Returns:
        `before`, and by guard and attack the figures of `run.Harm`; the bound as `max_update_norm`.
    """
    first = play_cell(shared, "none", "none", num_bad=num_bad, max_norm=0.0)
    max_norm = usual_norm(shared)
    cells: dict[str, dict[str, Any]] = {}
    for guard in GUARDS:
        for attack in run.ATTACKS:
            is_first = (guard, attack) == ("none", "none")
            cell = first if is_first else play_cell(shared, guard, attack, num_bad=num_bad, max_norm=max_norm)
            cells.setdefault(guard, {})[attack] = cell
    return {"before": run.before(shared, num_bad=num_bad), "max_update_norm": max_norm, "guards": cells}


def usual_norm(shared: World) -> float:
    """The median norm of the updates of the run without guard and attack."""
    log = events.read(shared.folder / "none-none" / events.FILE)
    return float(median(event.update_norm or 0.0 for event in log if isinstance(event, SiteTrained)))


def guarded(settings: config.RunConfig, guard: str, *, num_bad: int, max_norm: float) -> config.RunConfig:
    """The run under one guard; all sites weigh the same in every one, so that they can be compared."""
    changes: dict[str, Any] = {"weighting": "uniform"}
    given = settings.model_dump()
    if guard == "norm bound":
        changes["max_update_norm"] = max_norm
    elif guard == "screening":  # which leaves sites out, so that fewer must do
        changes["screening"] = {"action": "drop"}
        given["federation"]["min_sites"] = max(settings.federation.min_sites - num_bad, MIN_SCREENED)
    elif guard != "none":
        changes["robust"] = {"rule": guard, "num_bad_sites": num_bad}
    return config.RunConfig.model_validate({**given, "aggregation": {**given["aggregation"], **changes}})


def render(result: Mapping[str, Any]) -> Iterator[Table]:
    """Held-out loss and that of the attacker's answer, guards by attacks."""
    for figure, title in TITLES.items():
        table = Table("", *run.ATTACKS, title=title, box=None)
        for guard, cells in result["guards"].items():
            table.add_row(guard, *(f"{cells[attack][figure]:.3f}" for attack in run.ATTACKS))
        yield table


def play_cell(shared: World, guard: str, attack: str, *, num_bad: int, max_norm: float) -> dict[str, Any]:
    """One run, of a guard and an attack."""
    settings = guarded(shared.settings, guard, num_bad=num_bad, max_norm=max_norm)
    folder = shared.folder / f"{guard}-{attack}".replace(" ", "-")
    cell = replace(shared, settings=settings, folder=folder)
    return run.play(cell, attack, num_bad=num_bad, log=run_files.prepare(settings, folder))
