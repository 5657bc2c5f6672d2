"""Framework tax: what silotune costs beyond the training steps themselves, in CPU seconds on one thread.

Both arms run in fresh processes, by turns, so that what else the machine does falls on both. A round's cost is the
difference between the CPU clock at its end and at the end of the round before, so start-up, evaluation and export are
not in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, Final

from simulations.bench.arms import process
from simulations.bench.figures import Figure, result

NUM_REPEATS: Final = 3
BASE: Final = "embedded"
GOAL_STARTUP_S: Final = 12.0
GOAL_RATIOS: Final = {"10": 1.05, "1": 1.10}  # by the steps of a round
GOAL_PEAK_MIB: Final = 0.8 * 1024
GOAL_LOSS_DIFFERENCE: Final = 1e-3

Run = Mapping[str, Any]


def run() -> dict[str, Any]:
    """Measure start-up, cost of a round and peak memory: a 4-bit and a float32 base, ten steps a round and one."""
    arms = [(quantization, steps) for quantization in ("nf4", "none") for steps in GOAL_RATIOS]
    return result("tax", [figure for arm in arms for figure in compare(*arm)])


def compare(quantization: str, local_steps: str) -> list[Figure]:
    """Run both arms by turns with one precision of the base and so many steps a round."""
    ours, plain = [], []
    for _ in range(NUM_REPEATS):
        ours.append(process.measure("simulations.bench.arms.tax_silotune", quantization, BASE, local_steps))
        plain.append(process.measure("simulations.bench.arms.tax_plain", quantization, BASE, local_steps))
    label = f"{ {'none': 'float32'}.get(quantization, quantization) }, steps of a round: {local_steps}"
    return judge(ours, plain, label=label, goal_ratio=GOAL_RATIOS[local_steps])


def judge(ours: Sequence[Run], plain: Sequence[Run], *, label: str, goal_ratio: float) -> list[Figure]:
    """Medians of both arms, and what they say.

    Args:
        ours: Runs of silotune: `startup_cpu_s`, `rounds_cpu_s`, `losses`, `peak_rss_mib`.
        plain: Runs of the plain loop: `rounds_cpu_s`, `losses`.
        label: Precision of the base and steps of a round, for the names.
        goal_ratio: Most that a round may cost, beside the plain loop's.
    """
    cost, plain_cost = (median(costs(runs)) for runs in (ours, plain))
    return [
        Figure(f"start-up, {label}", median(run["startup_cpu_s"] for run in ours), "CPU s", GOAL_STARTUP_S),
        Figure(f"round, {label}: silotune", cost, "CPU s"),
        Figure(f"round, {label}: plain loop", plain_cost, "CPU s"),
        Figure(f"round, {label}: silotune / plain loop", cost / plain_cost, "x", goal_ratio),
        Figure(f"peak memory, {label}", max(run["peak_rss_mib"] for run in ours), "MiB", GOAL_PEAK_MIB),
        Figure(f"training loss, {label}: largest difference", apart(ours, plain), "nats", GOAL_LOSS_DIFFERENCE),
    ]


def costs(runs: Iterable[Run]) -> list[float]:
    """Cost of every round but the first, over all runs.

    Example:
        >>> costs([{"rounds_cpu_s": [5.0, 7.0, 10.0]}, {"rounds_cpu_s": [4.0, 6.5]}])
        [2.0, 3.0, 2.5]
    """
    return [end - start for run in runs for start, end in pairwise(run["rounds_cpu_s"])]


def apart(ours: Iterable[Run], plain: Iterable[Run]) -> float:
    """Largest difference between the arms' losses in any round; small if both did the same work."""
    pairs = [zip(left["losses"], right["losses"], strict=True) for left, right in zip(ours, plain, strict=True)]
    return float(max(abs(a - b) for pair in pairs for a, b in pair))
