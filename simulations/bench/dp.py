"""What differential privacy costs a training step: time and memory against the same step without it.

Time is measured in one process, the arms by turns, so that what else the machine does falls on all. Memory is compared
between processes of one arm each on a CPU, where only the whole process can be asked, and within one on a GPU.
"""

from collections.abc import Mapping
from typing import Any, Final

from common.model import base
from simulations.bench.arms import process
from simulations.bench.figures import Figure, result

ARM: Final = "simulations.bench.arms.dp"
GOAL_CPU: Final = 1.08
GOAL_GPU: Final = 1.05
GOAL_MEMORY: Final = 1.02
CPU_SHAPES: Final = ("10m", "135m")
GPU_SHAPES: Final = ("1b", "8b")


def run() -> dict[str, Any]:
    """Measure on the GPU if there is one, else on the CPU."""
    is_gpu = base.choose_device("auto").type == "cuda"
    shapes = GPU_SHAPES if is_gpu else CPU_SHAPES
    figures = [figure for shape in shapes for figure in (on_gpu(shape) if is_gpu else on_cpu(shape))]
    return result("dp", figures)


def on_gpu(shape: str) -> list[Figure]:
    """NF4 base, bfloat16, gradient checkpointing; Opacus cannot work under it."""
    arms = process.measure(ARM, shape, "plain,stacked")
    memory = arms["stacked"]["peak_mib"] / arms["plain"]["peak_mib"]
    return [
        *_step_figures(shape, arms, goal=GOAL_GPU),
        Figure(f"memory, {shape}: private / plain", memory, "x", GOAL_MEMORY),
    ]


def on_cpu(shape: str) -> list[Figure]:
    """Float32 base; Opacus' hooks and one unit at a time for comparison."""
    arms = process.measure(ARM, shape, "plain,stacked,microbatch,opacus")
    alone = {name: process.measure(ARM, shape, name)[name]["peak_mib"] for name in ("plain", "stacked")}
    memory = alone["stacked"] / alone["plain"]
    return [
        *_step_figures(shape, arms, goal=GOAL_CPU),
        Figure(f"memory, {shape}: private / plain", memory, "x", GOAL_MEMORY),
    ]


def _step_figures(shape: str, arms: Mapping[str, Mapping[str, float]], *, goal: float) -> list[Figure]:
    """The plain step, and each way as a ratio to it."""
    plain = arms["plain"]["seconds"]
    ways = {"stacked": "private", "microbatch": "one unit at a time", "opacus": "Opacus' hooks"}
    limits = {"stacked": goal}
    ratios = [
        Figure(f"step, {shape}: {words} / plain", arms[way]["seconds"] / plain, "x", limits.get(way))
        for way, words in ways.items()
        if way in arms
    ]
    return [Figure(f"step, {shape}: plain", plain, "s"), *ratios]
