"""Bytes to a held-out loss: integers both ways against float32 both ways and against 4-bit messages with metadata.

All arms are one run file with one seed under our own loop, and differ in what travels only (`bytes_arm`).
"""

from collections.abc import Mapping
from typing import Any, Final

from simulations.bench import process
from simulations.bench.figures import Figure, result

ARM: Final = "simulations.bench.bytes_arm"
OURS: Final = "int3"
TOLERANCE: Final = 0.02  # nats
GOAL_FLOAT32: Final = 1 / 8
GOAL_FOUR_BIT: Final = 1 / 1.2
BASELINES: Final = {"float32": ("float32 both ways", GOAL_FLOAT32), "nvflare": ("4-bit messages", GOAL_FOUR_BIT)}

Run = Mapping[str, Any]


def run() -> dict[str, Any]:
    """Play each arm in a process of its own."""
    return result("bytes", judge({name: process.measure(ARM, name) for name in (OURS, *BASELINES)}))


def judge(runs: Mapping[str, Run]) -> list[Figure]:
    """Bytes that each arm needed, and what they say.

    The loss to reach is the float32 arm's last one and the tolerance. Of the baselines only training is counted, as
    they evaluate elsewhere; of ours every frame, evaluations included, as a step often goes down with one.

    Args:
        runs: By arm, as `bytes_arm.main` returns them.
    """
    target = runs["float32"]["losses"][-1] + TOLERANCE
    ours, rounds = cost(runs[OURS], target, parts=("training", "evaluation"))
    figures = [
        Figure("held-out loss to reach", target, "nats"),
        Figure(f"silotune, {OURS} both ways: rounds", rounds, "rounds"),
        Figure(f"silotune, {OURS} both ways: a site", ours, "bytes"),
    ]
    for name, (words, goal) in BASELINES.items():
        theirs, their_rounds = cost(runs[name], target, parts=("training",))
        figures += [
            Figure(f"{words}: rounds", their_rounds, "rounds"),
            Figure(f"{words}: a site", theirs, "bytes"),
            Figure(f"bytes, silotune / {words}", ours / theirs, "x", goal),
        ]
    last = runs[OURS]["losses"][-1] - runs["float32"]["losses"][-1]
    messages = runs[OURS]["messages"] / (runs[OURS]["training"][-1] + runs[OURS]["evaluation"][-1])
    return [
        *figures,
        Figure("last held-out loss, silotune - float32 both ways", last, "nats", TOLERANCE),
        Figure("Flower's messages / frames in them, silotune", messages, "x"),
    ]


def cost(run: Run, target: float, *, parts: tuple[str, ...]) -> tuple[float, float]:
    """Bytes of a site, both ways, and rounds until the held-out loss is at most `target`; NaN where it never is.

    Example:
        >>> cost({"losses": [3.0, 2.0, 1.0], "training": [0, 40, 80], "num_sites": 4}, 2.0, parts=("training",))
        (10.0, 1.0)
    """
    reached = next((place for place, loss in enumerate(run["losses"]) if loss <= target), None)
    if reached is None:
        return float("nan"), float("nan")
    return sum(run[part][reached] for part in parts) / run["num_sites"], float(reached)
