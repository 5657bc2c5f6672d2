"""A federation of tiny sites in this process, with a clock that only moves when somebody sleeps."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from common import events
from common.event_kinds import Event
from common.model.base import Engine
from common.run.manifest import RunManifest
from server.export.folder import Exported
from tests import tiny
from tests.samples import federations
from tests.samples.coordinator import Coordinator

Node = Callable[[bytes], bytes | None]


@pytest.fixture
def federate(engine: Engine, tiny_base: Path, tmp_path: Path) -> Callable[..., Coordinator]:
    """Make a federation of functions that answer frames, by node id; `changes` are as on the command line."""

    def make(nodes: Mapping[int, Node], changes: Mapping[str, str] | None = None) -> Coordinator:
        return tiny.federation(engine, tmp_path / "run", nodes, tiny.settings(tiny_base, changes))

    return make


@pytest.fixture
def nodes(engine: Engine) -> dict[int, Node]:
    """North, south and west as nodes 1, 2 and 3."""
    return tiny.make_nodes(engine)


@pytest.fixture
def told(tmp_path: Path) -> Callable[[str], list[Event]]:
    """The run's events of one kind, so far."""

    def read(kind: str) -> list[Event]:
        path = tmp_path / "run" / "events.jsonl"
        return [event for event in events.read(path) if event["kind"] == kind] if path.exists() else []

    return read


@pytest.fixture(scope="module")
def first_day(tmp_path_factory) -> federations.Federation:
    return federations.start(tmp_path_factory.mktemp("first-day"))


@pytest.fixture(scope="module")
def with_sites(first_day, tmp_path_factory) -> federations.Federation:
    federation = first_day.copy(tmp_path_factory.mktemp("with-sites"))
    for name in ("alder", "birch"):
        federation.join(name)
    return federation


@pytest.fixture
def founded(first_day, tmp_path) -> federations.Federation:
    return first_day.copy(tmp_path)


@pytest.fixture
def joined(with_sites, tmp_path) -> federations.Federation:
    """With the sites alder and birch."""
    return with_sites.copy(tmp_path)


@pytest.fixture(scope="module")
def source(load_tiny: Callable[..., Engine], tiny_base: Path) -> Exported:
    """What an export is made of, its adapter large enough to be told from the base in every format."""
    engine = load_tiny()
    generator = torch.Generator().manual_seed(8)
    state = {name: 0.15 * torch.randn(tensor.shape, generator=generator) for name, tensor in engine.initial.items()}
    return Exported(state, RunManifest(tiny.settings(tiny_base), engine.base_sha256, engine.tensor_specs), 2, {}, [])
