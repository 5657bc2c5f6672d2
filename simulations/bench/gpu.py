"""Training on a GPU: tokens a second and memory beside TRL's SFTTrainer, with the same rows and the same base.

Rows have the lengths of instruction data (log-normal, median 365 tokens, 48 to 1,024; the last 40 % answer); padding is
not counted. TRL runs at its usual settings, and at its best: packed, with Liger's kernels.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from simulations.bench.arms import process
from simulations.bench.figures import Figure, result

ARM: Final = "simulations.bench.arms.gpu"
RUN_ARM: Final = "simulations.bench.arms.gpu_run"
PEAK_FLOPS: Final = 790e12  # bfloat16 products of random values on an H200
GOAL_USUAL: Final = 3.5
GOAL_BEST: Final = 1.3
GOAL_FULL: Final = 1.5
GOAL_UTILISATION: Final = 0.45
GOAL_PRIVATE: Final = 1.03
GOAL_PRIVATE_MEMORY: Final = 1.02
GOAL_LOSS: Final = 1e-3
GOAL_BUSY: Final = 0.85
GOAL_SITES: Final = 1.05
USUAL_ROWS: Final = {"1b": 8, "8b": 4}  # a device at once
CURVE_STEPS: Final = 200

Arm = Mapping[str, Any]


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure both shapes.

    Args:
        quick: The 1B shape alone, few steps, without the curve of the loss and the private arm.
    """
    figures = []
    for shape in ("1b",) if quick else ("1b", "8b"):
        figures += _speed(shape, quick=quick)
    if not quick:
        figures += [figure for shape in ("1b", "8b") for figure in _private(shape)]
        figures += _curve()
        figures += [figure for shape in ("1b", "8b") for figure in _whole_run(shape)]
    return result("gpu", figures)


def _speed(shape: str, *, quick: bool) -> list[Figure]:
    """Ours beside TRL's usual and best settings."""
    is_large = shape == "8b"
    settings = {
        "shape": shape,
        "batch_rows": 4 * USUAL_ROWS[shape],
        "num_steps": 9 if is_large else 13,
        "lengths": "real",
        "is_checkpointed": is_large,
        "micro_batch_tokens": 8192,
        "rows_at_once": USUAL_ROWS[shape],
        "packed_tokens": 0,
        "use_liger": False,
    }
    ours, usual = _measure("silotune", settings), _measure("trl", settings)
    best = _measure("trl", settings | {"packed_tokens": 4096, "use_liger": True})
    figures = [
        *_arm(f"{shape}, silotune", ours),
        *_arm(f"{shape}, TRL", usual),
        *_arm(f"{shape}, TRL packed with Liger", best),
        Figure(f"{shape}: silotune / TRL, tokens a second", _ratio(ours, usual), "x", GOAL_USUAL, is_floor=True),
        Figure(f"{shape}: silotune / TRL's best", _ratio(ours, best), "x", GOAL_BEST, is_floor=True),
        Figure(f"{shape}: memory, silotune / TRL", ours["peak_gib"] / usual["peak_gib"], "x", 1.0),
    ]
    if quick:
        return figures
    full = settings | {"lengths": "full"}
    ratio = _ratio(_measure("silotune", full), _measure("trl", full))
    figures.append(Figure(f"{shape}, rows of 1,024: silotune / TRL", ratio, "x", GOAL_FULL, is_floor=True))
    if is_large:
        open_ = _measure("silotune", settings | {"is_checkpointed": False, "micro_batch_tokens": 4096})
        share = open_["tokens_per_s"] * open_["flops_per_token"] / PEAK_FLOPS
        figures.append(Figure(f"{shape}, no checkpointing: MFU", share, "", GOAL_UTILISATION, is_floor=True))
    return figures


def _private(shape: str) -> list[Figure]:
    """A step that protects units beside one that does not."""
    settings = {
        "shape": shape,
        "batch_rows": 32,
        "num_steps": 9,
        "lengths": "real",
        "is_checkpointed": shape == "8b",
        "micro_batch_tokens": 8192,
    }
    plain, private = _measure("silotune", settings), _measure("silotune", settings | {"privacy": True})
    memory = private["peak_gib"] / plain["peak_gib"]
    return [
        Figure(f"{shape}: private / plain, time a token", _ratio(plain, private), "x", GOAL_PRIVATE),
        Figure(f"{shape}: private / plain, memory", memory, "x", GOAL_PRIVATE_MEMORY),
    ]


def _curve() -> list[Figure]:
    """The same losses as TRL from the same rows a step."""
    settings = {
        "shape": "135m",
        "batch_rows": 8,
        "num_steps": CURVE_STEPS,
        "lengths": "real",
        "is_checkpointed": False,
        "micro_batch_tokens": 8192,
        "rows_at_once": 8,
        "packed_tokens": 0,
        "use_liger": False,
    }
    ours, theirs = (_measure(who, settings)["losses"] for who in ("silotune", "trl"))
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    return [Figure(f"loss over {CURVE_STEPS} steps, 135m: largest relative difference to TRL", apart, "", GOAL_LOSS)]


def _whole_run(shape: str) -> list[Figure]:
    """How much of a run's time the card is at work, and what many sites on one card cost."""
    one, nine = (process.measure(RUN_ARM, shape, num_sites) for num_sites in ("2", "9"))
    return [
        Figure(f"{shape}, run of 9 sites: until the first round", nine["start_s"], "s"),
        Figure(f"{shape}, run of 9 sites: both rounds", nine["rounds_s"], "s"),
        Figure(
            f"{shape}, run of 9 sites: share of its rounds in which the card works",
            nine["busy"],
            "",
            GOAL_BUSY,
            is_floor=True,
        ),
        Figure(f"{shape}, run of 9 sites: second round's first answer", nine["second_wait_s"], "s"),
        Figure(f"{shape}: 9 sites / 2 sites, the same steps", nine["rounds_s"] / one["rounds_s"], "x", GOAL_SITES),
    ]


def _measure(who: str, settings: Mapping[str, Any]) -> Arm:
    """One arm in a process of its own."""
    return process.measure(ARM, who, json.dumps(settings))


def _arm(label: str, arm: Arm) -> list[Figure]:
    """What an arm measured."""
    share = arm["tokens_per_s"] * arm["flops_per_token"] / PEAK_FLOPS
    return [
        Figure(label, arm["tokens_per_s"], "tokens/s"),
        Figure(f"{label}: memory", arm["peak_gib"], "GiB"),
        Figure(f"{label}: MFU", share, ""),
    ]


def _ratio(arm: Arm, other: Arm) -> float:
    """Tokens a second over tokens a second."""
    return float(arm["tokens_per_s"] / other["tokens_per_s"])
