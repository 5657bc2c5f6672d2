"""What the way to the sites costs: a round through gateway, link, courier and agent against one in process."""

from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any, Final

from simulations.bench.arms import process
from simulations.bench.figures import Figure, result

NUM_ROUNDS: Final = 5

Run = Mapping[str, Any]


def run() -> dict[str, Any]:
    """Play the demo's run, cut short, in one process and as a deployed federation."""
    arm = "simulations.bench.arms.deployment"
    return result("deployment", judge(*(process.measure(arm, kind, str(NUM_ROUNDS)) for kind in ("near", "far"))))


def judge(near: Run, far: Run) -> list[Figure]:
    """Seconds and bytes of a round, evaluation included, of all sites together.

    Args:
        near: In process: `marks`, the time of every evaluation; `frame_bytes`, what all rounds and their evaluations
            sent both ways; `num_sites`.
        far: The same of the deployed run, and `wire_bytes`: what the gateway and the links sent each other, the
            TLS of both layers, the polls of couriers and everything from the start on included; `adapter_sha256` of
            either must be equal.
    """
    seconds = {name: median(end - start for start, end in pairwise(run["marks"])) for name, run in
               (("in process, one site after the other", near), ("deployed", far))}  # fmt: skip
    same = float(near["adapter_sha256"] == far["adapter_sha256"])
    first, second = seconds.values()
    return [
        *(Figure(f"a round of {near['num_sites']} sites, {name}", value, "s") for name, value in seconds.items()),
        Figure("a round, deployed / in process", second / first, "x"),
        Figure("frames of a site and round, both ways", _each(far, "frame_bytes"), "bytes"),
        Figure("on the wire of a site and round, both ways", _each(far, "wire_bytes"), "bytes"),
        Figure("on the wire / frames", far["wire_bytes"] / far["frame_bytes"], "x"),
        Figure("adapters that differ", 1 - same, "adapters", 0),
    ]


def _each(run: Run, name: str) -> float:
    """Of one site in one round."""
    return float(run[name] / run["num_sites"] / (len(run["marks"]) - 1))
