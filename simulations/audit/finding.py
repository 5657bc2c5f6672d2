"""What an audit found, beside what is claimed and what it could have found at best; never one without the others."""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

from rich.table import Table

Part = Literal["mechanism", "canaries", "mia", "inversion"]
THREATS: Final[dict[Part, str]] = {
    "mechanism": "An attacker who knows all units but one, whose unit may have any gradient, and who sees every noised "
    "step; nobody outside a site sees more. Tests draw, clip and noise; not the model, the rows or the network.",
    "canaries": "An attacker who has the base and the finished adapter, and knows the notes that may have been trained "
    "on; sees no update of a round. Tests the whole of training.",
    "mia": "An attacker who has the base and the finished adapter, and rows of units of which each may have been "
    "trained on; sees no update of a round. Tests what is remembered of usual rows.",
    "inversion": "A curious coordinator: knows the base and the adapter that it sent, and sees the update that one "
    "site trained on one note. Tests one attack; that it fails is no guarantee.",
}


@dataclass(frozen=True)
class Finding:
    """One audit's result.

    Attributes:
        claimed_epsilon: Upper bound; infinite where nothing is claimed.
        audited_epsilon: Lower bound; None where the part gives none.
        ceiling: The largest lower bound that this audit can give; None where it gives none.
        num_canaries: m: canaries, units or tokens that were looked for.
    """

    part: Part
    claimed_epsilon: float
    audited_epsilon: float | None
    ceiling: float | None
    num_canaries: int
    dp_delta: float
    figures: dict[str, float]

    @property
    def is_refuted(self) -> bool:
        """Whether the claim cannot be true."""
        return self.audited_epsilon is not None and not self.audited_epsilon <= self.claimed_epsilon

    def as_dict(self) -> dict[str, Any]:
        """For programs; JSON knows no infinite number, so it is a word."""
        return {
            "part": self.part,
            "claimed_epsilon": _plain(self.claimed_epsilon),
            "audited_epsilon": _plain(self.audited_epsilon),
            "ceiling": _plain(self.ceiling),
            "num_canaries": self.num_canaries,
            "dp_delta": self.dp_delta,
            "is_refuted": self.is_refuted,
            "threat_model": THREATS[self.part],
            "figures": {name: _plain(value) for name, value in self.figures.items()},
        }


def render(finding: Finding) -> Table:
    """For people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "claimed epsilon (at most)": _shown(finding.claimed_epsilon, without="nothing is claimed"),
        "audited epsilon (at least)": _shown(finding.audited_epsilon),
        "ceiling of this audit": _shown(finding.ceiling),
        "m": str(finding.num_canaries),
        "delta": f"{finding.dp_delta:g}",
        **{name.replace("_", " "): f"{value:.4g}" for name, value in finding.figures.items()},
        "threat model": THREATS[finding.part],
        "verdict": verdict(finding),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def verdict(finding: Finding) -> str:
    """One line; that nothing was refuted proves nothing."""
    if finding.is_refuted:
        return "REFUTED: the claim cannot be true; do not release this"
    if finding.audited_epsilon is None:
        return "a measurement; it bounds no epsilon"
    return "not refuted; a lower bound proves no privacy"


def _plain(value: float | None) -> float | str | None:
    """A number, or the word for one that JSON does not have."""
    return "infinite" if value == math.inf else value


def _shown(value: float | None, *, without: str = "infinite") -> str:
    """Two digits after the point."""
    if value is None:
        return "-"
    return without if value == math.inf else f"{value:.2f}"
