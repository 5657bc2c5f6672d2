"""The aggregation gap of single modules, for people: a round's largest, and the report's table of modules by rounds."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

MAX_ROUNDS: Final = 12


def short(module: str) -> str:
    """A module's name without what all names begin with.

    Example:
        >>> short("base_model.model.model.layers.0.mlp.up_proj")
        'layers.0.mlp.up_proj'
    """
    return module.removeprefix("base_model.model.").removeprefix("model.")


def largest(finished: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """The module with a round's largest gap, that gap as a share and its standard error; None where no module has one.

    Example:
        >>> gaps = {"model.layers.0.q_proj": 0.25, "model.layers.0.v_proj": 0.5}
        >>> largest({"gap_modules": gaps, "gap_module_errors": {"model.layers.0.v_proj": 0.04}})
        ('layers.0.v_proj', 0.5, 0.04)
    """
    modules = finished.get("gap_modules") or {}
    module = max(modules, key=modules.__getitem__, default="")
    error = (finished.get("gap_module_errors") or {}).get(module, 0.0)
    return (short(module), modules[module], error) if module and modules[module] > 0 else None


def table(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Gaps of every module in the newest rounds, the module with the largest last one first; None without any.

    Args:
        rounds: Events `round_finished`, one a round.
    """
    measured = [event for event in rounds if event.get("gap_modules")]
    shown = measured[-MAX_ROUNDS:]
    if not any(any(event["gap_modules"].values()) for event in shown):
        return None
    newest = shown[-1]["gap_modules"]
    names = sorted(newest, key=lambda name: (-newest[name], name))
    return {
        "rounds": [event["round"] + 1 for event in shown],
        "num_hidden": len(measured) - len(shown),
        "largest_error": max((shown[-1].get("gap_module_errors") or {}).values(), default=0.0),
        "modules": [(short(name), [event["gap_modules"].get(name) for event in shown]) for name in names],
    }
