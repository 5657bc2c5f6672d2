"""The arms of `bench aggregate`: the server's own functions on updates that were drawn."""

import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from common.adapter import adapter, compact
from common.adapter import broadcast as broadcast_form
from common.frame import wire
from common.frame.wire import Frame
from common.privacy import clipping
from common.run.catalogue.methods import FACTS
from common.run.schema.wire import WireConfig
from common.trust import identity, signed_frame
from server.aggregate import factored, gap, products
from server.aggregate.method import State
from server.aggregate.methods import table
from server.fleet import broadcast, trail
from server.folder import checkpoint
from simulations.bench.arms import process

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
STREAM: Final = "float32 additions"
TENSOR_PARTS: Final = ("decode and check", "norm", "combine", "gap")  # what is done with the values of an update
HASHES: Final = ("frame's hash", "signature and audit log")
ONCE: Final = ("checkpoint", "next request")
PARTS: Final = (*HASHES, *TENSOR_PARTS, *ONCE, STREAM)

Tensors = dict[str, Tensor]


def main(arm: str, argument: str, dtype: str = "") -> dict[str, Any]:
    """Run one arm on one thread.

    Args:
        arm: `round` or `factored`.
        argument: The number of sites; the method.
        dtype: `wire.dtype` of a round; empty: the default.
    """
    torch.set_num_threads(1)
    settings = WireConfig.model_validate({"dtype": dtype} if dtype else {})
    return whole_round(int(argument), settings) if arm == "round" else per_module(argument)


class Clock:
    """CPU seconds of the parts of a round."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what the block takes to one of `PARTS`."""
        began = time.process_time()
        yield
        self.seconds[name] += time.process_time() - began


def whole_round(num_sites: int, settings: WireConfig) -> dict[str, Any]:
    """All that a round of fedavg pays at the coordinator from an answer's bytes to the next request's, part by part.

    Float32 additions of the same updates, decoded beforehand, go by turns with it.

    Returns:
        `seconds` by part, `num_parameters`, and `peak_mib`: most memory during the round beyond what stood before it.
    """
    shapes = {f"{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    drawn = _draw(shapes, seed=1, std=0.1)
    specs, state = adapter.specs(drawn), _draw(shapes, seed=2, std=0.1)
    stream = {name: torch.zeros_like(tensor) for name, tensor in drawn.items()}
    body = compact.encode_update(drawn, settings, draws=compact.dice("bench"))
    with tempfile.TemporaryDirectory() as folder:
        key = identity.create(Path(folder) / "site.pem")
    packed = wire.pack(signed_frame.sign(Frame("update", {"site": "north"}, body), key=key, federation="bench"))
    signer, clock, method = identity.public_hex(key), Clock(), table.find("fedavg")
    before_mib = process.restart_peak()
    combined = method.start(state, trained=list(state))
    with clock.part("gap"):
        meter = gap.GapMeter(state, seed=1)
    for site in range(num_sites):
        data = bytes(bytearray(packed))  # each site's own
        with clock.part("frame's hash"):
            frame = wire.expect(data, "update", max_body_bytes=len(body))
        with clock.part("signature and audit log"):
            signed_frame.check(frame, key=signer, federation="bench")
            trail.of_frame(data)
        with clock.part("decode and check"):
            change: State = compact.decode_update(frame.body, specs, settings)
        with clock.part("norm"):
            change, _ = clipping.scaled(change, 0.0)
        with clock.part("combine"):
            combined.add(change, weight=site + 1.0)
        with clock.part("gap"):
            meter.add(change, weight=site + 1.0)
        del data, frame, change
        with clock.part(STREAM):
            for name, total in stream.items():
                total.add_(drawn[name])
    with clock.part("combine"):
        after = method.apply(state, combined.result())
    del combined
    with clock.part("gap"):
        meter.per_module(after)
    _send(state, after, clock, settings)
    return {
        "num_parameters": adapter.num_parameters(specs),
        "dtype": settings.dtype,
        "seconds": clock.seconds,
        "peak_mib": process.peak_mib() - before_mib,
    }


def _send(state: State, after: State, clock: Clock, settings: WireConfig) -> None:
    """The end of a round: its checkpoint, and the next request."""
    with tempfile.TemporaryDirectory() as folder, clock.part("checkpoint"):
        checkpoint.save(Path(folder), after, memory={}, num_rounds=1, run_sha256="")
    with clock.part("next request"):
        if settings.down == "float32":
            body = broadcast_form.plain_body("train", after, settings)
            hashlib.sha256(body)
        else:
            held, _, step = broadcast.settle(state, after, {}, sent=adapter.specs(after), dtype=settings.down)
            [(_, body, _)] = broadcast.forms(held, nodes=[1], held={1: step.base_sha256}, steps=[step])
        wire.pack(Frame("train", {}, body))


def per_module(name: str) -> dict[str, Any]:
    """One module through a round of a method, in the middle of a run: its side adapter is full."""
    has_side = FACTS[name].base_delta == "residual"
    state = _draw(MODULE, seed=0, std=0.01)
    trained = list(state)
    generator = torch.Generator().manual_seed(7)
    for module, (d, k) in MODULE.items() if has_side else ():
        u_dm = torch.randn(d, NUM_SITES * RANK, generator=generator)
        v_mk = torch.randn(NUM_SITES * RANK, k, generator=generator)
        state |= factored.cut_side(module, 1e-4 * u_dm, v_mk, like=(u_dm, v_mk))
    uploads = [_draw(MODULE, seed=site + 1, std=0.001) for site in range(NUM_SITES)]
    method, costs, gap_costs = table.find(name), [], []
    for _ in range(NUM_REPEATS):
        began = time.process_time()
        combined = method.start(state, trained=trained)
        for upload in uploads:
            combined.add(upload, weight=1.0)
        change = combined.result()
        after = method.apply(state, change)
        applied = time.process_time()
        gap.of_products(state, products.pairs(change), after)
        costs.append(applied - began)
        gap_costs.append(time.process_time() - applied)
    return {"cpu_s": median(costs), "gap_cpu_s": median(gap_costs)}


def _draw(shapes: dict[str, tuple[int, int]], *, seed: int, std: float) -> Tensors:
    """Both factors of modules, normal."""
    generator = torch.Generator().manual_seed(seed)
    drawn: Tensors = {}
    for module, (d, k) in shapes.items():
        b_dr, a_rk = torch.randn(d, RANK, generator=generator), torch.randn(RANK, k, generator=generator)
        drawn |= factored.named(module, std * b_dr, std * a_rk)
    return drawn
