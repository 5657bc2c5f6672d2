"""A federation of tiny sites in this process, with a clock that only moves when somebody sleeps."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from common import events
from common.events import EventLog
from common.manifest import RunManifest
from common.model import Engine
from server.aggregate import table
from server.federation import Federation
from tests import tiny

Node = Callable[[bytes], bytes | None]


@pytest.fixture
def federate(engine: Engine, tiny_base: Path, tmp_path: Path) -> Callable[..., Federation]:
    """Make a federation of functions that answer frames, by node id; `changes` are as on the command line."""

    def make(
        nodes: Mapping[int, Callable[[bytes], bytes | None]], changes: Mapping[str, str] | None = None
    ) -> Federation:
        manifest = RunManifest(tiny.settings(tiny_base, changes), engine.base_sha256, engine.tensor_specs)
        clock, sleep = tiny.fake_time()
        return Federation(
            manifest,
            tiny.fleet(nodes),
            table.find("fedavg"),
            tmp_path / "run",
            EventLog(tmp_path / "run" / "events.jsonl"),
            clock=clock,
            sleep=sleep,
        )

    return make


@pytest.fixture
def nodes(engine: Engine) -> dict[int, Callable[[bytes], bytes]]:
    """North, south and west as nodes 1, 2 and 3."""
    return {
        number: tiny.make_agent(site, engine, count=count).answer
        for number, (site, count) in enumerate(tiny.SITES.items(), start=1)
    }


@pytest.fixture
def told(tmp_path: Path) -> Callable[[str], list[events.Event]]:
    """The run's events of one kind, so far."""

    def read(kind: str) -> list[events.Event]:
        path = tmp_path / "run" / "events.jsonl"
        return [event for event in events.read(path) if event["kind"] == kind] if path.exists() else []

    return read
