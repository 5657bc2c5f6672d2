"""What a round's updates cost the coordinator: linear methods against memory bandwidth, factored ones in CPU time."""

from collections.abc import Mapping
from typing import Any, Final

from simulations.bench import process
from simulations.bench.figures import Figure, result

NUM_SITES: Final = (10, 100)
FACTORED: Final = ("flexlora", "fedex", "flora")
ARM: Final = "simulations.bench.aggregate_arm"
GOAL_RATIO: Final = 2.0
GOAL_MIB: Final = 50.0
GOAL_MODULE_S: Final = 0.1

Arm = Mapping[str, Any]


def run() -> dict[str, Any]:
    """Measure the mean over few and many sites, and one module of each method that factors."""
    few, many = (process.measure(ARM, "linear", str(num_sites)) for num_sites in NUM_SITES)
    factored = {name: process.measure(ARM, "factored", name) for name in FACTORED}
    return result("aggregate", judge(few, many, factored))


def judge(few: Arm, many: Arm, factored: Mapping[str, Arm]) -> list[Figure]:
    """What the arms say.

    Args:
        few: The linear arm with few sites.
        many: The same with many.
        factored: The other arm of each method.
    """
    sites = f"{NUM_SITES[1]} sites x {many['num_parameters'] / 1e6:.1f} M"
    growth = many["peak_rss_mib"] - few["peak_rss_mib"]
    return [
        Figure(f"mean of {sites}: silotune", many["combine_cpu_s"], "CPU s"),
        Figure(f"mean of {sites}: float32 additions", many["stream_cpu_s"], "CPU s"),
        Figure("silotune / float32 additions", many["combine_cpu_s"] / many["stream_cpu_s"], "x", GOAL_RATIO),
        Figure(f"peak memory, {NUM_SITES[1]} sites - {NUM_SITES[0]} sites", growth, "MiB", GOAL_MIB),
        *(
            Figure(f"{name}, a module of 4096 x 11008 and 10 sites", arm["cpu_s"], "CPU s", GOAL_MODULE_S)
            for name, arm in factored.items()
        ),
        *(Figure(f"{name}, the same: its gap", arm["gap_cpu_s"], "CPU s") for name, arm in factored.items()),
    ]
