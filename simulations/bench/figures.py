"""Figures with goals, and the machine that they were measured on: the one form that every benchmark's result has."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = ("torch", "transformers", "peft", "bitsandbytes", "flwr")


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        goal: The value may be at most this; None: measured for information.
        is_floor: The value must be at least the goal.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    is_floor: bool = False

    @property
    def ok(self) -> bool:
        """Whether the goal is met; NaN meets none.

        Example:
            >>> Figure("start-up", 7.0, "CPU s", goal=12.0).ok, Figure("start-up", float("nan"), "CPU s", goal=12.0).ok
            (True, False)
        """
        if self.goal is None:
            return True
        return self.value >= self.goal if self.is_floor else self.value <= self.goal


def result(bench: str, figures: Sequence[Figure]) -> dict[str, Any]:
    """Figures, in the order to show, as one JSON object.

    Returns:
        `bench`, `figures` (each with `name`, `value`, `unit`, `goal`, `ok`), `ok` (all goals met) and `machine`.
    """
    shown = [{**asdict(figure), "value": round(figure.value, 4), "ok": figure.ok} for figure in figures]
    return {"bench": bench, "figures": shown, "ok": all(figure.ok for figure in figures), "machine": machine()}


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores that this process may use, load of the last minute, versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
