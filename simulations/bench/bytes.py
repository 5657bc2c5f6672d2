"""Bytes to a held-out loss: our defaults and int3 both ways, against float32 and 4-bit messages with metadata.

All arms are one run file with one seed under our own loop, and differ in what travels only
(`simulations.bench.arms.bytes`).
"""

from collections.abc import Mapping
from typing import Any, Final

from simulations.bench.arms import process
from simulations.bench.figures import Figure, result

ARM: Final = "simulations.bench.arms.bytes"
TOLERANCE: Final = 0.02  # nats
BASELINES: Final = {"float32": "float32 both ways", "nvflare": "4-bit messages"}
# arm: words, and the most bytes it may need as a share of each baseline's; None: no goal
OURS: Final[Mapping[str, tuple[str, Mapping[str, float | None]]]] = {
    "default": ("defaults", {"float32": 1 / 4, "nvflare": None}),
    "int3": ("int3 both ways", {"float32": 1 / 8, "nvflare": 1 / 1.2}),
}

Run = Mapping[str, Any]


def run() -> dict[str, Any]:
    """Play each arm in a process of its own."""
    return result("bytes", judge({name: process.measure(ARM, name) for name in (*OURS, *BASELINES)}))


def judge(runs: Mapping[str, Run]) -> list[Figure]:
    """Bytes that each arm needed, and what they say.

    The loss to reach is the float32 arm's last one and the tolerance. Of the baselines only training is counted, as
    they evaluate elsewhere; of ours every frame, evaluations included, as a step often goes down with one.
    """
    target = runs["float32"]["losses"][-1] + TOLERANCE
    figures, needed = [Figure("held-out loss to reach", target, "nats")], {}
    parts = dict.fromkeys(OURS, ("training", "evaluation")) | dict.fromkeys(BASELINES, ("training",))
    for name, words in {**{name: f"silotune, {words}" for name, (words, _) in OURS.items()}, **BASELINES}.items():
        needed[name], rounds = cost(runs[name], target, parts=parts[name])
        figures += [Figure(f"{words}: rounds", rounds, "rounds"), Figure(f"{words}: a site", needed[name], "bytes")]
    for name, (words, goals) in OURS.items():
        for baseline, goal in goals.items():
            ratio = needed[name] / needed[baseline]
            figures.append(Figure(f"bytes, {words} / {BASELINES[baseline]}", ratio, "x", goal))
        last = runs[name]["losses"][-1] - runs["float32"]["losses"][-1]
        figures.append(Figure(f"last held-out loss, {words} - float32 both ways", last, "nats", TOLERANCE))
    messages = runs["default"]["messages"] / (runs["default"]["training"][-1] + runs["default"]["evaluation"][-1])
    return [*figures, Figure("Flower's messages / frames in them, defaults", messages, "x")]


def cost(run: Run, target: float, *, parts: tuple[str, ...]) -> tuple[float, float]:
    """Bytes of a site, both ways, and rounds until the held-out loss is at most `target`; NaN where it never is.

    Example:
        >>> cost({"losses": [3.0, 2.0, 1.0], "training": [0, 40, 80], "num_sites": 4}, 2.0, parts=("training",))
        (10.0, 1.0)
    """
    reached = next((index for index, loss in enumerate(run["losses"]) if loss <= target), None)
    if reached is None:
        return float("nan"), float("nan")
    return sum(run[part][reached] for part in parts) / run["num_sites"], float(reached)
