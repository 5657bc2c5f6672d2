"""One site in this process, behind its socket, with a relay before it; and what a courier gets there."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.agent import process
from client.agent.agent import Agent
from client.agent.gatekeeper import Gatekeeper
from client.agent.pressure import Limit
from client.courier import door as service
from client.courier import line
from common.adapter import adapter
from common.errors import SilotuneError
from common.frame import wire
from common.frame.records import RoundPlan, to_head
from common.frame.wire import Frame
from common.model.base import Engine
from common.run import config, manifest
from common.run.config import RunConfig
from common.run.manifest import RunManifest
from common.trust import identity
from common.trust.heads import Heads
from tests.leaks import captures, faults, relays, world
from tests.leaks.relays import Record
from tests.samples import vault

KINDS = ("open", "evaluate", "train")
DAY_S = 86_400
ANY_NUMBER = 1_000_000
Answer = Callable[[bytes], bytes]


@dataclass
class Bench:
    """A site that can be asked.

    Attributes:
        agent: The product's own.
        answer: Who answers behind the socket; at first the agent.
        requests: A frame of each kind.
        door: The socket that a courier knows.
        record: What passed.
        logs: Folder of the site's own logs.
        told: What the courier's side was told of failures.
    """

    agent: Agent
    answer: Answer
    requests: Mapping[str, bytes]
    door: Path
    record: Record
    logs: Path
    told: list[str]

    def ask(self, kind: str) -> Frame | None:
        """What a courier gets; None if the call fails."""
        try:
            reply = line.call(self.door, kind, self.requests[kind], 60.0)
        except SilotuneError as error:
            self.told.append(f"{type(error).__name__} {error} {error.__cause__} {error.__context__}")
            return None
        return wire.unpack(reply, max_body_bytes=1 << 28)

    def at_socket(self) -> list[bytes]:
        """All that passed, and what the courier made of it."""
        told = "\n".join(self.told).encode()
        return [told, *(part for one in self.record.all() for part in captures.of_grpc(one))]


@contextmanager
def running(
    settings: RunConfig, rows: Sequence[Mapping[str, str]], *, folder: Path, base: Path, engine: Engine, policy: str
) -> Iterator[Bench]:
    """Serve a site's agent, made from files as in production; see `world.play` for the arguments."""
    site = world.write_sites(settings, {"north": rows}, folder=folder, base=base, policy=policy)["north"]
    agent = process.make_agent(config.load_node(site.socket_path.with_name("node.toml")))
    door = site.socket_path.with_name("courier.sock")
    with relays.before_socket(door, site.socket_path) as record:
        asked = requests(settings, engine=engine, operator=folder / world.OPERATOR_KEY)
        bench = Bench(agent, agent.answer, asked, door, record, folder / "logs", [])
        server = service.serve(
            lambda frame: bench.answer(frame), socket_path=site.socket_path, max_message_bytes=1 << 28
        )
        yield bench
        server.stop(None).wait()


def requests(settings: RunConfig, *, engine: Engine, operator: Path) -> dict[str, bytes]:
    """A signed offer, and both steps of the first round."""
    run = RunManifest(settings, engine.base_sha256, engine.tensor_specs, engine.codes_sha256)
    not_after = int(time.time()) + DAY_S
    key = identity.load(operator)
    told = vault.told(key=key, federation=world.FEDERATION)
    offer = manifest.sign(run, key, federation=world.FEDERATION, not_after=not_after)
    body = adapter.encode(engine.initial, dtype="float32")
    evaluate = Frame("evaluate", to_head(RoundPlan(run.sha256, 0, generate=True)) | told, body)
    train = Frame("train", to_head(RoundPlan(run.sha256, 0)) | told, body)
    return {"open": wire.pack(offer.to_frame()), "evaluate": wire.pack(evaluate), "train": wire.pack(train)}


def raise_points(bench: Bench, kind: str) -> list[str]:
    """Functions that a request passes; each is a place to fail."""
    ready(bench, kind)
    return faults.passed_by(bench.agent.answer, bench.requests[kind])


def fail(bench: Bench, kind: str, *, at: str, error: Callable[[], Exception]) -> bool:
    """Ask with an error at this function; whether it was raised."""
    ready(bench, kind)
    raised: list[Exception] = []

    def make() -> Exception:
        raised.append(error())
        return raised[-1]

    bench.answer = faults.failing_at(bench.agent.answer, at, make)
    bench.ask(kind)
    bench.answer = bench.agent.answer
    return bool(raised)


def ready(bench: Bench, kind: str) -> None:
    """Bring the agent to where it answers this kind of request in full: no quota is used up, no news is old."""
    guard = bench.agent._guard
    if isinstance(guard, Gatekeeper):
        guard._opens = guard._refusals = Limit(ANY_NUMBER)
        guard._heads.path.unlink(missing_ok=True)
        guard._heads = Heads(guard._heads.path, world.FEDERATION)
        shutil.rmtree(guard._moves._folder, ignore_errors=True)
        guard._moves._kept = ("", -1)
        for run in guard.history.runs.values():
            run.steps.clear()  # an adapter is held against the last one only at a step that was not answered yet
    bench.ask("open")  # the first offer passes functions that no other does
    if kind == "open":
        bench.agent._run = None  # so that rows and base are read again


def refuse(bench: Bench, kind: str, error: Callable[[], Exception]) -> None:
    """Let the agent fail at every request of a kind, so that what is passed is the way of a refusal."""

    def step(_: Frame) -> Frame:
        raise error()

    bench.agent._steps[kind] = step
