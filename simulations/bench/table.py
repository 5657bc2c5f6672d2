"""The benchmarks by name; adding one is a module with `run()` and a line here."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

from rich.table import Table

from common.errors import ConfigError

BENCHES: Final[Mapping[str, str]] = {
    "tax": "start-up, cost of a round and memory, against a plain transformers and peft loop; about 10 minutes",
    "dp": "time and memory of a private training step against a plain one; on a GPU if there is one; about 10 minutes",
    "bytes": "bytes to a held-out loss, against float32 both ways and 4-bit messages; about 10 minutes",
    "scale": "cost and memory a site, from 1 to 1,000 virtual sites; about 15 minutes",
    "gpu": "tokens a second and memory of training on a GPU beside TRL; about 20 minutes, --quick about 4",
    "deployment": "seconds and bytes of a round through gateway, links and agents, against one in process; 5 minutes",
    "aggregate": "all that the updates of a round cost the coordinator, against memory bandwidth; 2 minutes",
}


QUICK: Final = frozenset({"gpu"})  # benchmarks that have a short form


def run(name: str, *, quick: bool = False) -> dict[str, Any]:
    """Run a benchmark, or list them.

    Args:
        name: One of `BENCHES`, or `list`.
        quick: The short form, where there is one.

    Returns:
        As `figures.result`; for `list` the object `benches`, names with what they measure.

    Raises:
        ConfigError: No such benchmark, or it has no short form.
        SilotuneError: A measured process failed.
    """
    if name == "list":
        return {"benches": dict(BENCHES)}
    if name not in BENCHES:
        raise ConfigError(f"bench '{name}': there is {', '.join(BENCHES)}; and list")
    if quick and name not in QUICK:
        raise ConfigError(f"bench {name} has no --quick; {', '.join(sorted(QUICK))} has")
    measure: Callable[..., dict[str, Any]] = import_module(f"simulations.bench.{name}").run
    return measure(quick=True) if quick else measure()


def render(result: Mapping[str, Any]) -> Table:
    """A result as a table for people: one line a figure and the machine below, or the list of benchmarks."""
    if "benches" in result:
        table = Table("bench", "measures", box=None, pad_edge=False)
        for name, measures in result["benches"].items():
            table.add_row(name, measures)
        return table
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    table = Table("figure", "value", "goal", "", box=None, pad_edge=False, caption=machine, caption_justify="left")
    for figure in result["figures"]:
        bound = "at least" if figure["is_floor"] else "at most"
        goal = "" if figure["goal"] is None else f"{bound} {figure['goal']:g}"
        holds = "" if figure["goal"] is None else "ok" if figure["ok"] else "[red]missed[/]"
        table.add_row(figure["name"], f"{figure['value']:g} {figure['unit']}", goal, holds)
    return table
