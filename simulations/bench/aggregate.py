"""What a round's updates cost the coordinator, all of it, against plain float32 additions of the same updates."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from simulations.bench.arms import process
from simulations.bench.arms.aggregate import HASHES, ONCE, STREAM, TENSOR_PARTS
from simulations.bench.figures import Figure, result

NUM_SITES: Final = (17, 100)
FLOATS: Final = "bfloat16"  # what each part's goal is of
INTEGERS: Final = ("int8", "int4")
FACTORED: Final = ("flexlora", "fedex", "flora")
ARM: Final = "simulations.bench.arms.aggregate"
GOAL_RATIO: Final = 2.0
GOAL_GROWTH_MIB: Final = 50.0
GOAL_MODULE_S: Final = 0.1

Arm = Mapping[str, Any]


def run() -> dict[str, Any]:
    """Measure a whole round of few and of many sites, integers on the wire, and one module of methods that factor."""
    few, many = (process.measure(ARM, "round", str(num_sites), FLOATS) for num_sites in NUM_SITES)
    integers = [process.measure(ARM, "round", str(NUM_SITES[0]), dtype) for dtype in INTEGERS]
    factored = {name: process.measure(ARM, "factored", name) for name in FACTORED}
    return result("aggregate", [*judge(few, many), *of_integers(integers), *of_factored(factored)])


def judge(few: Arm, many: Arm) -> list[Figure]:
    """What a round costs with few and with many sites, each part as a ratio to the additions of the same run."""
    update_mib = many["num_parameters"] * 4 / 2**20
    figures = []
    for num_sites, arm in zip(NUM_SITES, (few, many), strict=True):
        sites, seconds = f"{num_sites} sites x {arm['num_parameters'] / 1e6:.1f} M, {arm['dtype']}", arm["seconds"]
        figures += [
            Figure(f"{sites}: {STREAM}", seconds[STREAM], "CPU s"),
            *(
                Figure(f"{name} / {STREAM}, {num_sites} sites", _ratio(arm, name), "x")
                for name in (*HASHES, *TENSOR_PARTS)
            ),
            *(Figure(f"{name}, once a round", seconds[name], "CPU s") for name in ONCE),
            Figure(
                f"{', '.join(TENSOR_PARTS)}: all / {STREAM}, {num_sites} sites",
                sum(_ratio(arm, part) for part in TENSOR_PARTS),
                "x",
                GOAL_RATIO,
            ),
        ]
    growth = many["peak_mib"] - few["peak_mib"]
    return [
        *figures,
        Figure(f"peak memory, {NUM_SITES[1]} sites", many["peak_mib"] / update_mib, "float32 updates"),
        Figure(f"peak memory, {NUM_SITES[1]} sites - {NUM_SITES[0]} sites", growth, "MiB", GOAL_GROWTH_MIB),
    ]


def of_integers(arms: Sequence[Arm]) -> list[Figure]:
    """What it costs where integers come up; the wire is then a quarter or less, and the processor pays for it."""
    return [
        Figure(f"{arm['dtype']}: {name} / {STREAM}", _ratio(arm, name), "x")
        for arm in arms
        for name in (*HASHES, *TENSOR_PARTS)
    ]


def of_factored(factored: Mapping[str, Arm]) -> list[Figure]:
    """One module of each method that factors."""
    return [
        *(
            Figure(f"{name}, a module of 4096 x 11008 and 10 sites", arm["cpu_s"], "CPU s", GOAL_MODULE_S)
            for name, arm in factored.items()
        ),
        *(Figure(f"{name}, the same: its gap", arm["gap_cpu_s"], "CPU s") for name, arm in factored.items()),
    ]


def _ratio(arm: Arm, part: str) -> float:
    """A part's seconds over those of the additions."""
    return float(arm["seconds"][part] / arm["seconds"][STREAM])
