"""One arm of `bench deployment`: a run in process, or through gateway, links, couriers and agents."""

import asyncio
import hashlib
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from common import events
from common.errors import TransportError
from common.event_kinds import Evaluated, RoundFinished
from common.model.base import hash_base
from common.run import config
from server.folder import run_files
from server.run import launch
from simulations.engines import deployment, guarded
from simulations.engines.deployment import HOST
from simulations.world import run, world
from simulations.world.world import Source, World

RUN_FILE: Final = Path(__file__).parents[2] / "configs" / "demo.toml"
_CHUNK_BYTES: Final = 1 << 16
_START_S: Final = 10.0
_POLICY: Final = {
    "learning_rate": "[1e-6, 1e-2]",
    "min_local_steps": "1",
    "min_records": "1",
    "mode": '"none"',
    "min_slice": "1",
    "round_metrics_to": "6",
    "approval": '"none"',
}


def main(kind: str, num_rounds: str) -> dict[str, Any]:
    """Play the demo's run, `near` or `far`; returns when each evaluation was done and what was sent."""
    changes = {"federation.num_rounds": num_rounds, "evaluation.exact_match_rows": "0", "training.local_epochs": "0.25"}
    settings = config.load(RUN_FILE, overrides=changes)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder, sent = Path(temporary) / "run", 0
        if kind == "near":
            engine, prepared = world.load_engine(settings, num_threads=1), run_files.prepare(settings, folder)
            run.in_process(World(settings, engine, Source.of(settings).sites(), folder), log=prepared)
        else:
            # As a federation of processes; what is sent is what passes between links and gateway.
            source, base_sha256 = Source.of(settings), hash_base(world.EMBEDDED_BASE)
            tables = source.tables()
            rules, logs = _POLICY | {"min_sites": str(len(tables))}, folder.with_name("logs")
            policy = partial(guarded.kit_policy, base_sha256=base_sha256, changes=rules)
            with (
                guarded.built(source, tables, base_folder=world.EMBEDDED_BASE, policy=policy, logs=logs) as built,
                counted(built.ports["fleet"]) as way,
            ):
                with guarded.running(built, logs=logs, fleet=way.address) as started:
                    launch.run(
                        settings,
                        address=started.control,
                        ca_file=started.ca_file,
                        identity=started.operator,
                        folder=folder,
                        base=world.EMBEDDED_BASE,
                        resume=False,
                        is_quiet=True,
                        operator_key=started.operator_key,
                        federation=guarded.FEDERATION,
                        roster_folder=started.folder,
                    )
                sent = way.num_bytes
        log = events.read(folder / events.FILE)
        adapter = (folder / run_files.EXPORT_FOLDER / "adapter_model.safetensors").read_bytes()
    return {
        "marks": [event.time for event in log if isinstance(event, Evaluated)],
        "frame_bytes": sum(
            (event.bytes_up or 0) + (event.bytes_down or 0)
            for event in log
            if isinstance(event, RoundFinished | Evaluated)
        ),
        "num_sites": settings.federation.num_sites,
        "adapter_sha256": hashlib.sha256(adapter).hexdigest(),
        "wire_bytes": sent,
    }


class Way:
    """A relay on loopback that counts what passes, both ways."""

    def __init__(self) -> None:
        self.port, self.num_bytes = deployment.free_port(), 0

    @property
    def address(self) -> str:
        """Where it listens, `host:port`."""
        return f"{HOST}:{self.port}"

    async def relay(self, target: int, *, is_there: threading.Event) -> None:
        """Listen, until `end` is called."""
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await reader.read(_CHUNK_BYTES):
                    self.num_bytes += len(data)
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there_reader, there_writer = await asyncio.open_connection(HOST, target)
            await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

        server = await asyncio.start_server(accept, HOST, self.port)
        is_there.set()
        await self._ended.wait()
        server.close()

    def end(self) -> None:
        """Let `relay` return, from another thread."""
        self._loop.call_soon_threadsafe(self._ended.set)


@contextmanager
def counted(port: int) -> Iterator[Way]:
    """A relay to a port, in a thread of its own."""
    way, is_there = Way(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(way.relay(port, is_there=is_there)), daemon=True)
    thread.start()
    if not is_there.wait(_START_S):
        raise TransportError(f"the relay did not listen within {_START_S:g} s")
    try:
        yield way
    finally:
        way.end()
        thread.join()
