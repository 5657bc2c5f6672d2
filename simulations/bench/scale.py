"""What a virtual site costs when there are more of them: CPU seconds and memory, from 1 to 1,000 sites."""

from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any, Final

from simulations.bench.arms import process
from simulations.bench.figures import Figure, result

BASE: Final = "embedded"
NUM_ROUNDS: Final[Mapping[int, int]] = {1: 20, 10: 10, 100: 3, 1000: 2}
GOAL_RATIO: Final = 1.5
GOAL_GROWTH_MIB: Final = 150.0

Run = Mapping[str, Any]


def run() -> dict[str, Any]:
    """Play rounds with 1, 10, 100 and 1,000 sites, each number in a process of its own."""
    arm = "simulations.bench.arms.scale"
    runs = {size: process.measure(arm, str(size), str(rounds), BASE) for size, rounds in NUM_ROUNDS.items()}
    return result("scale", judge(runs))


def judge(runs: Mapping[int, Run]) -> list[Figure]:
    """Cost and memory at every size, and what 1,000 sites have that 10 have not.

    Args:
        runs: By number of sites: `marks`, pairs of CPU and wall clock at the end of every round, and `peak_rss_mib`.
    """
    figures = []
    for size, measured in runs.items():
        figures += [
            Figure(f"{size:,} sites: CPU a site and round", cost(measured, size, clock=0), "s"),
            Figure(f"{size:,} sites: wall time a site and round", cost(measured, size, clock=1), "s"),
            Figure(f"{size:,} sites: peak memory", measured["peak_rss_mib"], "MiB"),
        ]
    ratio = cost(runs[1000], 1000, clock=0) / cost(runs[10], 10, clock=0)
    growth = runs[1000]["peak_rss_mib"] - runs[10]["peak_rss_mib"]
    return [
        *figures,
        Figure("CPU a site and round, 1,000 sites / 10 sites", ratio, "x", GOAL_RATIO),
        Figure("peak memory, 1,000 sites - 10 sites", growth, "MiB", GOAL_GROWTH_MIB),
    ]


def cost(measured: Run, num_sites: int, *, clock: int) -> float:
    """Median seconds of a round, evaluation included, a site.

    Args:
        clock: 0 for CPU, 1 for wall time.

    Example:
        >>> cost({"marks": [(0.0, 0.0), (2.0, 5.0), (4.0, 9.0), (8.0, 20.0)]}, 10, clock=0)
        0.2
    """
    return float(median(end[clock] - start[clock] for start, end in pairwise(measured["marks"]))) / num_sites
