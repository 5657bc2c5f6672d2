"""The arms of `bench aggregate`: the server's own functions on updates that were drawn."""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from common.methods import FACTS
from server.aggregate import factored, gap, products, table
from simulations.bench import process

RANK: Final = 16
LAYERS: Final = 32  # of an 8 B Llama: 41.9 M parameters at rank 16
SHAPES: Final = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
MODULE: Final = {"down": (4096, 11008)}
NUM_SITES: Final = 10
NUM_REPEATS: Final = 5

Tensors = dict[str, Tensor]


def main(arm: str, argument: str) -> dict[str, Any]:
    """Run one arm on one thread.

    Args:
        arm: `linear` or `factored`.
        argument: The number of sites; the method.
    """
    torch.set_num_threads(1)
    return linear(int(argument)) if arm == "linear" else per_module(argument)


def linear(num_sites: int) -> dict[str, Any]:
    """The mean of so many updates as they cross, in bfloat16, and additions of the same in float32 by turns with it."""
    shapes = {f"{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    drawn = _draw(shapes, seed=1, std=0.1)
    sent = {name: tensor.bfloat16() for name, tensor in drawn.items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in drawn.items()}
    stream = {name: torch.zeros_like(tensor) for name, tensor in drawn.items()}
    method = table.find("fedavg")
    combined = method.start(state, trained=list(state))
    combine_s = stream_s = 0.0
    for site in range(num_sites):
        upload, decoded = ({name: tensor.clone() for name, tensor in one.items()} for one in (sent, drawn))
        began = time.process_time()
        combined.add(upload, weight=site + 1.0)
        between = time.process_time()
        for name, total in stream.items():
            total.add_(decoded[name])
        combine_s, stream_s = combine_s + between - began, stream_s + time.process_time() - between
    began = time.process_time()
    method.apply(state, combined.result())
    combine_s += time.process_time() - began
    return {
        "num_parameters": sum(tensor.numel() for tensor in drawn.values()),
        "combine_cpu_s": combine_s,
        "stream_cpu_s": stream_s,
        "peak_rss_mib": process.peak_rss_mib(),
    }


def per_module(name: str) -> dict[str, Any]:
    """One module through a round of a method, in the middle of a run: its side adapter is full."""
    has_side = FACTS[name].base_delta == "residual"
    state = _draw(MODULE, seed=0, std=0.01) | (_side(MODULE, rank=NUM_SITES * RANK) if has_side else {})
    trained = list(_draw(MODULE, seed=0, std=0.01))
    uploads = [_draw(MODULE, seed=site + 1, std=0.001) for site in range(NUM_SITES)]
    costs = list(_rounds(name, state, trained, uploads))
    return {"cpu_s": median(cost for cost, _ in costs), "gap_cpu_s": median(cost for _, cost in costs)}


def _rounds(name: str, state: Tensors, trained: list[str], uploads: list[Tensors]) -> Iterator[tuple[float, float]]:
    """CPU seconds of combining and applying, and of the gap, round after round."""
    method = table.find(name)
    for _ in range(NUM_REPEATS):
        began = time.process_time()
        combined = method.start(state, trained=trained)
        for upload in uploads:
            combined.add(upload, weight=1.0)
        found = combined.result()
        after = method.apply(state, found)
        applied = time.process_time()
        gap.of_products(state, products.pairs(found), after)
        yield applied - began, time.process_time() - applied


def _draw(shapes: dict[str, tuple[int, int]], *, seed: int, std: float) -> Tensors:
    """Both factors of modules, normal."""
    generator = torch.Generator().manual_seed(seed)
    drawn: Tensors = {}
    for module, (d, k) in shapes.items():
        b_dr, a_rk = torch.randn(d, RANK, generator=generator), torch.randn(RANK, k, generator=generator)
        drawn |= factored.named(module, std * b_dr, std * a_rk)
    return drawn


def _side(shapes: dict[str, tuple[int, int]], *, rank: int) -> Tensors:
    """A full side adapter of modules."""
    generator = torch.Generator().manual_seed(7)
    drawn: Tensors = {}
    for module, (d, k) in shapes.items():
        u_dm, v_mk = torch.randn(d, rank, generator=generator), torch.randn(rank, k, generator=generator)
        drawn |= factored.cut_side(module, 1e-4 * u_dm, v_mk, like=(u_dm, v_mk))
    return drawn
