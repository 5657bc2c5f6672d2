"""How sites of each precision fare, beside the noise of their base; for terminal and report. Loads no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.event_kinds import Event
from common.frame.records import SiteMetrics
from common.run.schema import precisions
from common.run.schema.model import ModelConfig
from common.scores import PrecisionLoss


def quantization(plan: Event) -> str:
    """The precision of a run's base, the sites that have another, and how much of the coordinator's body has it.

    Example:
        >>> quantization({"quantization": "nf4", "quantised_share": 1.0, "site_quantization": {"south": "int8"}})
        'nf4 (south = int8), 100 % of its body'
    """
    others = ", ".join(f"{site} = {name}" for site, name in plan.get("site_quantization", {}).items())
    share = plan.get("quantised_share", 0.0)
    stored = f"{plan['quantization']} ({others})" if others else str(plan["quantization"])
    return f"{stored}, {percent(share)} of its body" if share else stored


def percent(share: float) -> str:
    """A part of a base's weights; never 100 % of less than all.

    Example:
        >>> percent(1.0), percent(0.9999), percent(0.126)
        ('100 %', '99.9 %', '12.6 %')
    """
    return "100 %" if share == 1 else f"{math.floor(1000 * share) / 10:g} %"


def losses(settings: ModelConfig, metrics: Sequence[SiteMetrics]) -> dict[str, PrecisionLoss] | None:
    """Held-out loss over the sites of each precision; None where all sites have one.

    Each is over its own sites' rows: the difference between two of them is also that of their rows.
    """
    if not settings.site_quantization:
        return None
    found: dict[str, list[SiteMetrics]] = {}
    for one in metrics:
        found.setdefault(precisions.of_site(settings, one.site), []).append(one)
    return {
        name: PrecisionLoss(
            loss=sum(m.loss_sum for m in own) / sum(m.num_terms for m in own), sites=[m.site for m in own]
        )
        for name, own in sorted(found.items())
    }


def table(log: Sequence[Event]) -> list[dict[str, Any]]:
    """A row for each precision: its sites, its noise, and the held-out loss of the untrained base and of the adapter.

    Empty for a run whose sites have one precision.
    """
    noise = [event["precisions"] for event in log if event["kind"] == "base_noise"]
    evaluated = [event for event in log if event["kind"] == "evaluated" and "precisions" in event]
    if not noise or not evaluated:
        return []
    before: dict[str, Any] = next((event["precisions"] for event in evaluated if event["num_rounds"] == 0), {})
    return [
        {
            "name": name,
            "sites": ", ".join(own["sites"]),
            "error": noise[-1][name]["error"],
            "targets": noise[-1][name]["targets"],
            "base_loss": before.get(name, {}).get("loss"),
            "loss": own["loss"],
        }
        for name, own in evaluated[-1]["precisions"].items()
    ]


def line(row: Mapping[str, Any]) -> str:
    """A row in words.

    Example:
        >>> row = {"name": "nf4", "sites": "north", "error": 0.093, "targets": {"q_proj": 0.092, "v_proj": 0.094}}
        >>> line({**row, "base_loss": 3.25, "loss": 0.5})
        'nf4 (north): weights off by 9.30 % (q_proj 9.20 %, v_proj 9.40 %); untrained base 3.250, now 0.500'
    """
    targets = ", ".join(f"{name} {100 * error:.2f} %" for name, error in row["targets"].items())
    base = "-" if row["base_loss"] is None else f"{row['base_loss']:.3f}"
    off = f"weights off by {100 * row['error']:.2f} %" + f" ({targets})" * bool(row["error"])
    return f"{row['name']} ({row['sites']}): {off}; untrained base {base}, now {row['loss']:.3f}"
