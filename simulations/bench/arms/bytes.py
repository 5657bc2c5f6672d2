"""The measured arm of `bench bytes`: one run, every frame of every site counted where it enters and leaves the site."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from flwr.app import Message
from flwr.common.serde import message_to_proto
from torch import Tensor

from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.event_kinds import Evaluated, Event
from common.frame import wire
from common.frame.records import ADAPTER
from common.frame.wire import Frame
from common.run.manifest import RunManifest
from server.fleet.grid import GridFleet
from server.run import run as server_run
from simulations.commands import commands
from simulations.engines.grid import Answer, InProcessGrid
from simulations.world import world
from simulations.world.world import Failures

RUN_FILE: Final = Path(__file__).parents[2] / "configs" / "bench-bytes.toml"
MAX_BYTES: Final = 1 << 30
BLOCK_VALUES: Final = 64  # NVFLARE's 4-bit filter calls bitsandbytes with its default
FLOATS: Final = {"wire.dtype": "float32", "wire.down": "float32"}
ARMS: Final[Mapping[str, Mapping[str, str]]] = {
    "float32": FLOATS,
    "nvflare": FLOATS,
    "default": {},
    "int3": {"wire.dtype": "int3", "wire.down": "int3"},
}


@dataclasses.dataclass
class Counter:
    """Bytes at the sites' edge so far.

    Attributes:
        training: Of requests to train and their answers, frames whole.
        evaluation: Of requests to evaluate and their answers.
    """

    training: int = 0
    evaluation: int = 0

    def add(self, kind: str, num_bytes: int) -> None:
        """Count one exchange."""
        if kind == "train":
            self.training += num_bytes
        elif kind == "evaluate":
            self.evaluation += num_bytes


class CountingGrid(InProcessGrid):
    """Counts the bytes of Flower's own messages, as they are serialised for gRPC."""

    def __init__(self, answers: Mapping[int, Answer]) -> None:
        super().__init__(answers)
        self.num_bytes = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Count what goes down."""
        return super().push_messages([self._count(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Count what comes up."""
        return [self._count(message) for message in super().pull_messages(message_ids)]

    def _count(self, message: Message) -> Message:
        """One message; those that open the run are left out, as their frames are."""
        if message.metadata.message_type != "query.open":
            self.num_bytes += message_to_proto(message).ByteSize()
        return message


def main(name: str) -> dict[str, Any]:
    """Run one arm of `ARMS`.

    Returns:
        `losses`, held-out, after each round, the base's first; `training` and `evaluation`, bytes of all sites by then;
        `num_values`, parameters of the adapter; `num_sites`; `messages`, bytes of Flower's messages at the end.
    """
    counter, losses, training, evaluation = Counter(), [], [], []

    def watch(event: Event) -> None:
        if isinstance(event, Evaluated):
            losses.append(event.loss)
            training.append(counter.training)
            evaluation.append(counter.evaluation)

    with tempfile.TemporaryDirectory() as folder:
        order = commands.Order(RUN_FILE, ARMS[name], output=Path(folder) / "run", as_json=True, num_threads=1)
        shared = order.world()
        log = order.log(shared)
        log.listeners.append(watch)
        failures = Failures(shared.folder / "sites")
        run = server_run.manifest_of(shared.settings, shared.engine)
        nodes = {
            number: _counted(world.make_agent(site, data, shared.engine, failures).answer, counter, run, name=name)
            for number, (site, data) in enumerate(sorted(shared.sites.items()), start=1)
        }
        grid = CountingGrid(nodes)
        server_run.execute(shared.settings, fleet=GridFleet(grid), engine=shared.engine, folder=shared.folder, log=log)
    return {
        "losses": losses,
        "training": training,
        "evaluation": evaluation,
        "num_values": adapter.num_parameters(run.tensor_specs),
        "num_sites": len(nodes),
        "messages": grid.num_bytes,
    }


def _counted(
    node: Callable[[bytes], bytes], counter: Counter, run: RunManifest, *, name: str
) -> Callable[[bytes], bytes]:
    """A site whose frames are counted; one of a baseline is sent the adapter whole with every request to train."""
    scored: wire.Bytes = b""  # of the last request to evaluate, which the next one to train would name by its hash

    def respond(data: bytes) -> bytes:
        nonlocal scored
        request = wire.unpack(data, max_body_bytes=MAX_BYTES)
        if ARMS[name] is not FLOATS or request.kind == "open":
            reply = node(data)
            counter.add(request.kind, len(data) + len(reply))
            if ARMS[name] is not FLOATS:
                return reply
            # The answer to the offer names no adapter, so that the site is sent the first one too.
            opened = wire.expect(reply, "opened", max_body_bytes=0)
            return wire.pack(dataclasses.replace(opened, head={**opened.head, "adapter_sha256": ""}))
        if request.kind == "evaluate":
            scored = request.body
            return node(data)
        head = {key: value for key, value in request.head.items() if key != ADAPTER}
        whole = dataclasses.replace(request, head=head, body=scored)
        if name == "nvflare":
            return _through_filters(node, whole, counter, run)
        reply = node(wire.pack(whole))
        counter.add("train", len(wire.pack(whole)) + len(reply))
        return reply

    return respond


def _through_filters(node: Callable[[bytes], bytes], request: Frame, counter: Counter, run: RunManifest) -> bytes:
    """The adapter down and its change up, each as NF4 with its state; our frames' heads are not counted."""
    down, num_down = filtered(adapter.decode(request.body, run.plan.tensors.received, dtype="float32"))
    answered = node(wire.pack(dataclasses.replace(request, body=adapter.encode(down, dtype="float32"))))
    reply = wire.expect(answered, "update", max_body_bytes=MAX_BYTES)
    up, num_up = filtered(adapter.decode(reply.body, run.plan.trained(request.head["round_index"]), dtype="float32"))
    counter.add("train", num_down + num_up)
    return wire.pack(dataclasses.replace(reply, body=adapter.encode(up, dtype="float32")))


def filtered(tensors: Tensors) -> tuple[dict[str, Tensor], int]:
    """Tensors after NVFLARE's ModelQuantizer and ModelDequantizer with `normfloat4`, and the bytes between them.

    Counted are the packed values, the blocks' absolute maxima and the table of 16 values that comes with each tensor,
    as NVFLARE's own log counts them; names, shapes and the serialisation around them are not.

    Source: NVFLARE, nvflare/app_opt/pt/quantization/quantizer.py and dequantizer.py.
    """
    after, num_bytes = {}, 0
    for name, tensor in tensors.items():
        values, state = quantize_4bit(tensor.contiguous(), blocksize=BLOCK_VALUES, quant_type="nf4")
        parts = [part for part in state.as_dict().values() if isinstance(part, Tensor)]
        num_bytes += values.nbytes + sum(part.nbytes for part in parts)
        after[name] = dequantize_4bit(values, state).to(torch.float32)
    return after, num_bytes
